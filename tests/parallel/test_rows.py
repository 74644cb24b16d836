"""Tables whose gradients travel as rows, shared or dealt out, compute what plain PyTorch computes on one process."""

import functools
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import small
import torch
from plain import assert_same, plain, planned, ragged_gpt
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sheaf import Loss, Task
from sheaf.api.verify import verify
from sheaf.checkpoint import load, save
from sheaf.errors import PlanError, TaskError, WorkerFailed
from sheaf.parallel.build import build, refuse
from sheaf.parallel.rows.ahead import Guess
from sheaf.parallel.rows.meeting import Form
from sheaf.parallel.rows.pulls import Line, Owner
from sheaf.parallel.server.link import Keys
from sheaf.plans import Plan

STEPS = 4
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=1e-2),
    "adamw": ADAMW,
}


class Bag(nn.Module):
    """Classifies ragged texts by the mean of their words, beside a table of topics and one that nobody uses."""

    def __init__(self, *, frozen: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(23, 6, mode="mean", padding_idx=0, sparse=sparse)
        self.topics = nn.Embedding(5, 6, scale_grad_by_freq=not sparse, padding_idx=-1, sparse=sparse)
        self.unused = nn.Embedding(3, 6)
        self.head = nn.Linear(6, 4)
        self.words.weight.requires_grad_(not frozen)

    def forward(self, texts: torch.Tensor, starts: torch.Tensor, topics: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.words(texts, starts) + self.topics(topics) * self.topics(topics + 0)))


class Block(nn.Module):
    """Lookups, dropout and a layer: what recompute=full runs again as one."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(23, 6, mode="sum")
        self.topics, self.mix, self.drop = nn.Embedding(5, 6), nn.Linear(6, 6), nn.Dropout(0.3)

    def forward(self, before: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        texts, starts, topics = given
        return before + self.drop(torch.tanh(self.mix(self.words(texts, starts) * self.topics(topics))))


class Blocks(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(6, 4)

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        read = self.head.weight.sum(0)[None]
        for block in self.blocks:
            read = block(read, *given)
        return self.head(read)


def bag(**changes: Any) -> Task:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 6, (25,), generator=generator).tolist()
    data = [
        (torch.randint(0, 23, (length,), generator=generator), index % 5, (3 * index) % 4)
        for index, length in enumerate(lengths)
    ]

    def collate(items: list[Any]) -> dict[str, torch.Tensor]:
        texts, topics, labels = zip(*items, strict=True)
        ends = torch.tensor([len(text) for text in texts]).cumsum(0)
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), ends[:-1]))
        return {"x": torch.cat(texts), "s": starts, "t": torch.tensor(topics), "y": torch.tensor(labels)}

    def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> Loss:
        return Loss(F.cross_entropy(output, batch["y"], reduction="sum"), len(batch["y"]))

    task = Task(
        model=Bag,
        loss=loss,
        optimizer=ADAMW,
        data=data,
        collate=collate,
        inputs=lambda batch: (batch["x"], batch["s"], batch["t"]),
        batch=9,
        microbatch=2,
        precision="fp64",
        clip=0.05,
    )
    return replace(task, **changes)


def task(name: str) -> Task:
    kind, _, optimizer = name.partition("/")
    if kind == "bag":
        made = bag()
    elif kind == "blocks":
        made = bag(model=Blocks)
    elif kind == "frozen":
        made = bag(model=functools.partial(Bag, frozen=True))
    elif kind == "ragged_gpt":
        made = replace(ragged_gpt(), precision="fp64")
    else:
        made = replace(small.SMALL[kind](), precision="fp64", clip=0.3)
    return replace(made, optimizer=OPTIMIZERS[optimizer]) if optimizer else made


@functools.cache
def reference(name: str):
    return plain(task(name), STEPS)


def compare(ranks: Any, name: str, plan: str) -> None:
    made = task(name)
    workers = int(plan.partition("dp=")[2][0])
    found = ranks(lambda: planned(made, plan, STEPS), workers)
    assert_same(found[0], reference(name), 1e-9)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("bag/sgd", "dp=2,words=sparse,topics=sparse"),
        ("bag/adam", "dp=3,*=sparse"),
        ("bag/adamw", "dp=4,words=sparse,shares=stolen"),
        ("ragged_gpt", "dp=2,tokens=sparse"),
        ("bag/adam", "dp=3,words=sparse,head=tp"),
        ("lstm_seq2seq", "dp=3,*_words=sparse,head=tp"),
    ],
)
def test_sparse(ranks: Any, name: str, plan: str) -> None:
    compare(ranks, name, plan)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("bag/sgd", "dp=2,words=rows,topics=rows"),
        ("bag/adam", "dp=4,*=rows"),  # the unused table has rows for three of them
        ("bag/adamw", "dp=4,words=rows,topics=sparse,shares=3:1:0:2"),
        ("frozen/sgd", "dp=2,*=rows"),
        ("blocks/adam", "dp=2,*=rows,recompute=full"),
        ("lstm_seq2seq", "dp=3,*_words=rows,head=tp,recompute=full"),
        ("lstm_seq2seq/adam", "dp=2,source_words=rows,target_words=sparse"),
        ("bert", "dp=2,positions=rows,types=rows"),
    ],
)
def test_rows(ranks: Any, name: str, plan: str) -> None:
    compare(ranks, name, plan)


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    torch.sparse.check_sparse_tensor_invariants.disable()  # or its own step warns that this was left open
    return torch.optim.Adagrad(parameters, lr=0.1)


class Sums(nn.Module):
    """Nothing but a table: classes by the sum of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(23, 4, mode="sum", sparse=True)

    def forward(self, texts: torch.Tensor, starts: torch.Tensor, topics: torch.Tensor) -> torch.Tensor:
        return self.words(texts, starts) + topics[:, None]


@pytest.mark.parametrize(
    ("model", "optimizer", "plan"),
    [
        (functools.partial(Bag, sparse=True), OPTIMIZERS["sgd"], "dp=3"),
        (functools.partial(Bag, sparse=True), adagrad, "dp=2,shares=2:1"),
        (Sums, torch.optim.SparseAdam, "dp=4,words=sparse"),
    ],
)
def test_gradients_that_torch_keeps_as_rows_meet_as_rows(ranks: Any, model: Any, optimizer: Any, plan: str) -> None:
    made = bag(model=model, optimizer=optimizer, clip=None)
    wanted = plain(made, STEPS)
    wanted.gradients = [{name: value.to_dense() for name, value in one.items()} for one in wanted.gradients]
    assert_same(ranks(lambda: planned(made, plan, STEPS), int(plan[3]))[0], wanted, 1e-9)


def test_shared_tables_stay_alike_to_the_last_bit(ranks: Any) -> None:
    def run() -> list[float]:
        step = build(bag(precision="fp32"), Plan.parse("dp=3,words=sparse,topics=sparse"))
        for _ in range(STEPS):
            step()
        found = step.model.words.weight.flatten().tolist() + step.model.topics.weight.flatten().tolist()
        assert 0 < step._holding.rows.sent_bytes < STEPS * 2 * (23 + 5) * (4 * 6 + 4)
        step.close()
        return found

    first, *others = ranks(run, 3)
    assert all(other == first for other in others)


def test_rows_are_pulled_ahead_of_their_turn_and_a_block_alone_is_held(ranks: Any) -> None:
    def run() -> tuple[list[int], int, tuple[int, ...]]:
        step = build(bag(), Plan.parse("dp=3,words=rows,topics=rows"))
        store = step._runner.parts.pulling.store
        missed = []
        for _ in range(STEPS):
            step()
            missed.append(store.missed)
        pulled, shape = store.pulled, tuple(step.optimizer.state[step.model.words.weight]["exp_avg"].shape)
        with pytest.raises(Exception, match="whose other rows are pulled in a step"):
            step.model.words(torch.tensor([[1]]))
        step.close()
        return missed, pulled, shape

    for rank, (missed, pulled, shape) in enumerate(ranks(run, 3)):
        assert missed == [0] * STEPS  # which of the batch's numbers are words is guessed right from the start
        assert pulled > 0
        assert shape == ((8, 8, 7)[rank], 6)


class Positions(nn.Module):
    """Looks up what no batch holds: places, and hashes of words."""

    own = False

    def __init__(self) -> None:
        super().__init__()
        self.places, self.hashes, self.out = nn.Embedding(9, 4), nn.Embedding(13, 4), nn.Linear(4, 5)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hashed = (given * 1000).long().abs() * 7 % 13
        places = torch.arange(given.shape[1], dtype=torch.int32)
        read = checkpoint(self.read, places, hashed, use_reentrant=False) if self.own else self.read(places, hashed)
        return self.out(read + 0 * self.places.weight.shape[0])

    def read(self, places: torch.Tensor, hashed: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.places(places) + self.hashes(hashed)).mean(1)


class Checkpointed(Positions):
    own = True


class Functional(Positions):
    def read(self, places: torch.Tensor, hashed: torch.Tensor) -> torch.Tensor:
        return super().read(places, hashed) + F.embedding(hashed, self.hashes.weight).mean(1)


def placed(model: Any) -> Task:
    generator = torch.Generator().manual_seed(3)
    data = [(torch.randn(6, generator=generator), index % 5) for index in range(20)]
    return Task(
        model=model,
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=ADAMW,
        data=data,
        batch=8,
        microbatch=2,
        precision="fp64",
    )


def test_what_no_batch_tells_of_is_asked_for_when_it_is_looked_up(ranks: Any) -> None:
    made = placed(Positions)
    assert_same(ranks(lambda: planned(made, "dp=2,*=rows", STEPS), 2)[0], plain(made, STEPS), 1e-9)


@pytest.mark.parametrize(("model", "why"), [(Checkpointed, "torch.utils.checkpoint"), (Functional, "by a function")])
def test_lookups_that_a_layer_cannot_see_to_are_refused(ranks: Any, model: Any, why: str) -> None:
    made = placed(model)

    def run() -> str:
        try:
            planned(made, "dp=2,*=rows", 1)
        except PlanError as error:
            return str(error)
        return ""

    assert all(why in text for text in ranks(run, 2))


@pytest.mark.parametrize("plan", ["dp=2,words=rows,topics=rows", "dp=2,words=sparse,topics=rows"])
def test_a_checkpoint_goes_on(ranks: Any, plan: str, tmp_path: Any) -> None:
    def run() -> tuple[list[float], list[float]]:
        whole, first, second = (build(bag(), Plan.parse(plan)) for _ in range(3))
        wanted = [whole().loss for _ in range(5)]
        found = [first().loss for _ in range(2)]
        second()
        load(second, save(first, tmp_path))
        found += [second().loss for _ in range(3)]
        for step in (whole, first, second):
            step.close()
        return wanted, found

    for wanted, found in ranks(run, 2):
        assert found == wanted


@pytest.fixture
def on_ranks(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(function: Any, workers: int, *args: Any, threads: int) -> Any:
        return ranks(function, workers, *args)

    monkeypatch.setattr("sheaf.launch.run", run)


@pytest.mark.thinned(2)
@pytest.mark.usefixtures("on_ranks")
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("gpt", "dp=2,tokens=sparse,positions=rows"),
        ("bag", "dp=2,words=rows,topics=sparse"),
        ("lstm_seq2seq", "dp=2,*_words=rows,head=tp"),
    ],
)
def test_verify_finds_it_exact(name: str, plan: str) -> None:
    made = bag(precision="fp32") if name == "bag" else small.SMALL[name]()
    verdict = verify(made, plan, steps=1)
    assert verdict.exact, str(verdict)


def refusal(made: Task, plan: str) -> str:
    with pytest.raises(PlanError) as caught:
        refuse(made, Plan.parse(plan))
    return str(caught.value)


def test_refusals() -> None:
    tied = small.SMALL["transformer_seq2seq"]()
    assert "linear uses it whole, as a tied output layer does: use tokens=sparse" in refusal(tied, "dp=2,tokens=rows")
    assert "wrds=rows names no table of rows; did you mean words?" in refusal(bag(), "dp=2,wrds=rows")
    assert "head=sparse names no table of rows" in refusal(bag(), "dp=2,head=sparse")
    narrow = bag(model=functools.partial(Bag, sparse=True), clip=None, optimizer=torch.optim.Adagrad)
    assert "use words=sparse, or build it with sparse=False" in refusal(narrow, "dp=2,words=rows")
    assert "use dp=2 alone" in refusal(narrow, "dp=2,zero=1")
    assert "of which torch takes no norm, and the task has clip" in refusal(replace(narrow, clip=1.0), "dp=2")
    assert "the optimizer takes none" in refusal(replace(narrow, optimizer=ADAMW), "dp=2")
    muon = bag(optimizer=lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2]))
    assert "use dp=2 without rows" in refusal(muon, "dp=2,words=rows")
    renormed = bag(model=lambda: nn.EmbeddingBag(23, 4, max_norm=1.0))
    assert "built with max_norm" in refusal(renormed, "dp=2")


def test_a_table_that_forward_uses_whole_is_refused_when_no_rehearsal_saw_it(ranks: Any) -> None:
    class Hidden(Bag):
        def forward(self, texts: torch.Tensor, starts: torch.Tensor, topics: torch.Tensor) -> torch.Tensor:
            out = super().forward(texts, starts, topics)
            return out + self.words.weight.norm() if float(out.detach().sum()) > -1e9 else out

    made = bag(model=Hidden)

    def run() -> str:
        try:
            planned(made, "dp=2,words=rows", 1)
        except PlanError as error:
            return str(error)
        return ""

    assert all("norm uses it whole" in text for text in ranks(run, 2))


def test_state_that_no_checkpoint_holds_is_refused_by_name() -> None:
    made = bag(model=functools.partial(Bag, sparse=True), optimizer=OPTIMIZERS["sgd"], clip=None)
    step = build(made, Plan())
    step()
    with pytest.raises(TaskError, match="SGD keeps momentum_buffer"):
        step.state()
    step.close()


def test_an_owner_gives_nothing_stale_and_no_rows_of_others() -> None:
    table = nn.Parameter(torch.arange(12.0).view(4, 3))
    form = Form("words.weight", 8, 3, torch.float32, starts=(0, 4, 8))
    keys = Keys(b"t" * 32, b"d" * 32)
    owner = Owner(socket.create_server(("127.0.0.1", 0)), keys, [form], [table], 1)
    line, ahead, late = (Line(1, owner.address, 0, keys, [form]) for _ in range(3))
    assert line.ask(0, [torch.tensor([4, 6])]).result(10)[0].tolist() == [[0.0, 1.0, 2.0], [6.0, 7.0, 8.0]]
    coming = ahead.ask(1, [torch.tensor([5])])
    assert line.ask(0, [torch.tensor([7])]).result(10)[0].tolist() == [[9.0, 10.0, 11.0]]
    assert not coming.done()
    with torch.no_grad():
        table += 100
    owner.updated()
    assert coming.result(10)[0].tolist() == [[103.0, 104.0, 105.0]]
    with pytest.raises(WorkerFailed, match="which holds rows of words"):
        line.ask(0, [torch.tensor([4])]).result(10)
    with pytest.raises(WorkerFailed, match="is lost"):
        late.ask(1, [torch.tensor([3])]).result(10)  # another worker's row
    stranger = Line(1, owner.address, 0, Keys(b"x" * 32, b"d" * 32), [form])
    with pytest.raises(WorkerFailed, match="its token is wrong"):
        stranger.ask(1, [torch.tensor([4])]).result(10)
    waiting = ahead.ask(2, [torch.tensor([4])])
    owner.close()
    with pytest.raises(WorkerFailed, match="is lost"):
        waiting.result(10)
    for one in (line, ahead, late, stranger):
        one.close()


def test_a_lookup_learns_which_numbers_of_a_batch_are_its_rows() -> None:
    guess = Guess(10)
    texts, labels = torch.tensor([3, 3, 8, 1]), torch.tensor([9, 2])
    assert guess.wanted([texts, labels]).tolist() == [1, 2, 3, 8, 9]
    guess.learn([texts, labels], torch.tensor([1, 3, 8]))
    assert guess.wanted([torch.tensor([5, 77, -1]), labels]).tolist() == [5]
    other = Guess(10)
    other.learn([texts, labels], torch.tensor([0, 4]))
    assert other.wanted([texts, labels]).tolist() == [0, 4]
    both = Guess(10)
    both.learn([texts, labels], torch.tensor([2, 3]))
    assert both.wanted([texts, labels]).tolist() == [1, 2, 3, 8, 9]
