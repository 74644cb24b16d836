"""The price of tables that travel as rows: counted in the task's own microbatches, and what the executors send."""

from dataclasses import replace
from typing import Any

import made
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sheaf import Task
from sheaf.cost import price
from sheaf.graph import trace
from sheaf.graph.facts import ModelFacts, TableFact
from sheaf.graph.lookups import tables
from sheaf.plans import Plan
from sheaf.search import Question, search

ROWS, WIDTH, SIZES = 20_000, 64, [4] * 8
TOUCHED = (100.0, 180.0, 250.0)
SENT = 3 / 4  # of what leaves a worker of four when each has a quarter


def facts(*, whole: bool = False) -> ModelFacts:
    """Four blocks of which the first is a table."""
    plain = made.facts(4, block_elements=ROWS * WIDTH)
    first = replace(plain.parameters[0], shape=(ROWS, WIDTH))
    table = TableFact("b0.weight", ROWS, 4 * WIDTH, 4, TOUCHED, whole)
    return replace(plain, parameters=(first, *plain.parameters[1:]), tables=(table,))


def priced(text: str, **changes: Any) -> Any:
    return price(Plan.parse(text), facts(**changes), made.cluster(4), None, microbatches=SIZES)


def test_what_travels_is_what_is_touched() -> None:
    dense, shared, dealt = (priced(text).traffic_bytes for text in ("dp=4", "dp=4,b0=sparse", "dp=4,b0=rows"))
    table, touched = 4 * ROWS * WIDTH, TOUCHED[1]  # two microbatches for each worker
    assert dense - shared == pytest.approx(2 * SENT * table - 3 * touched * (4 * WIDTH + 4))
    assert dense - dealt == pytest.approx(2 * SENT * table - 2 * SENT * touched * (4 * WIDTH + 4))


def test_a_dealt_table_is_held_once_over_all_workers() -> None:
    dense, shared, dealt = (priced(text).memory for text in ("dp=4", "dp=4,b0=sparse", "dp=4,b0=rows"))
    saved = 4 * ROWS * WIDTH * 3 // 4
    assert dense["parameters"] - dealt["parameters"] == saved
    assert dense["optimizer_state"] - dealt["optimizer_state"] == 2 * saved
    assert shared["parameters"] == dense["parameters"]


def test_replicas_do_not_wait_for_a_slow_worker_to_update_its_copy_of_a_table() -> None:
    unlike = made.cluster(1, speeds=(1.0, 0.5))
    one, two = (
        price(Plan.parse(f"dp=2,b0={answer}"), facts(), unlike, made.profile(facts()), microbatches=[4] * 4)
        for answer in ("sparse", "rows")
    )
    whole = sum(each.size_bytes for each in facts().parameters) * made.profile(facts()).optimizer_seconds_per_byte
    assert one.seconds["optimizer"] == pytest.approx(whole), "of the fast worker, table and all"
    assert one.seconds["wait"] == pytest.approx(two.seconds["wait"] + whole), "and for as long the slow one is late"


def test_a_table_that_is_used_whole_sends_every_row() -> None:
    assert priced("dp=4,b0=sparse", whole=True).step_seconds > priced("dp=4").step_seconds


@pytest.mark.parametrize(("samples", "rows"), [(0, 0.0), (4, 100.0), (8, 180.0), (12, 250.0), (4e9, 20_000.0)])
def test_rows_between_and_beyond_what_was_sampled(samples: float, rows: float) -> None:
    table = facts().tables[0]
    assert table.touched(samples) == pytest.approx(rows)
    assert 0 < table.touched(2) < 100 < table.touched(6) < 180 < 250 < table.touched(16) < 2 * 180


def test_the_search_proposes_rows_where_they_are_cheapest() -> None:
    given: dict[str, Any] = {"batch": 32, "microbatch": 4, "allow_relaxed": False}
    slow = Question(facts={4: facts()}, cluster=made.cluster(4, bytes_per_second=1e7), **given)
    best = search(slow).ranked
    proposed = [str(entry.plan) for entry in best if "b0=" in str(entry.plan)]
    assert {"dp=2,b0=sparse", "dp=4,b0=rows"} <= set(proposed)  # of two workers each sends all that it touched
    seconds = {str(entry.plan): entry.price.step_seconds for entry in best}
    assert seconds["dp=4,b0=rows"] < seconds["dp=4"]
    used_whole = Question(facts={4: facts(whole=True)}, cluster=made.cluster(4, bytes_per_second=1e7), **given)
    assert not any("b0=" in str(entry.plan) for entry in search(used_whole).ranked)
    no_slices = replace(slow, elementwise=False)
    assert any("b0=sparse" in str(entry.plan) for entry in search(no_slices).ranked)
    assert not any("b0=rows" in str(entry.plan) for entry in search(no_slices).ranked)


class Words(nn.Module):
    """Reads words from their end, and hashes of them; the head is a table too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hashes = nn.Embedding(50, 4), nn.Embedding(7, 4)
        self.drop, self.norm = nn.Dropout(0.5), nn.LayerNorm(4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.flip(1)
        read = self.words(tokens) + self.drop(self.hashes(tokens % 7))
        return self.norm(read.masked_fill((tokens == 0)[..., None], 0.0)) @ self.words.weight.T


def test_distinct_rows_are_counted_in_the_tasks_own_microbatches() -> None:
    data = torch.randint(0, 50, (24, 5), generator=torch.Generator().manual_seed(2))
    task = Task(
        model=Words,
        loss=lambda output, batch: F.cross_entropy(output.flatten(0, 1), batch.flatten()),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        data=data,
        inputs=lambda batch: (batch,),
        batch=12,
        microbatch=3,
        shuffle=False,
    )
    words, hashes = trace(task, 3).tables
    found = [data[start : start + 3] for start in range(0, 24, 3)]
    assert words.whole
    assert not hashes.whole
    assert (words.rows, words.row_bytes, hashes.name) == (50, 16, "hashes.weight")
    assert words.distinct[0] == sum(part.unique().numel() for part in found) / 8
    assert words.distinct[1] == sum(torch.cat(found[i : i + 2]).unique().numel() for i in (0, 2, 4, 6)) / 4
    assert words.distinct[7] == data.unique().numel()
    assert hashes.distinct[0] == sum((part % 7).unique().numel() for part in found) / 8
    assert tables(replace(task, model=lambda: nn.Linear(5, 50)), 3) == ()
