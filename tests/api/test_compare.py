"""Several ways for gradients to meet, one run each, in one picture."""

import importlib
import json
import math

import pytest
from tiny import tiny

from sheaf.api.compare import compare, modes
from sheaf.api.train import train
from sheaf.cli import main
from sheaf.errors import NonFiniteLoss, PlanError
from sheaf.plans import Plan


def test_ways_are_put_on_top_of_a_plan():
    named = modes("all-reduce; compress=bf16 ; local=4:diloco,zero=0", Plan.parse("dp=2,zero=1").with_text("zero=0"))
    assert {name: str(plan) for name, plan in named.items()} == {
        "all-reduce": "dp=2",
        "compress=bf16": "dp=2,compress=bf16",
        "local=4:diloco,zero=0": "dp=2,local=4:diloco",
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("all-reduce", "two or more"),
        ("local=4; local=4", "twice"),
        ("local=x; compress=zip; all-reduce", "local=x"),
        ("local=x; compress=zip; all-reduce", "compress=zip"),
    ],
)
def test_bad_ways_are_all_told_at_once(text, told):
    with pytest.raises(PlanError, match=told):
        modes(text, Plan(dp=2))


def test_a_plan_that_meets_otherwise_is_no_all_reduce():
    with pytest.raises(PlanError, match=r"all-reduce: this is the plan itself, and gradients of dp=2,server=2 meet"):
        modes("all-reduce; server=2:async", Plan.parse("dp=2,server=2"))


@pytest.mark.whole
def test_each_way_has_a_run_and_all_have_one_picture(tmp_path):
    done = compare(tiny(), "all-reduce; local=3; compress=int8", "dp=2", steps=8, out=tmp_path / "runs", quiet=True)
    assert list(done.runs) == ["all-reduce", "local=3", "compress=int8"]
    assert done.picture.read_bytes()[:4] == b"\x89PNG"
    rows = {str(row["mode"]): row for row in done.rows}
    assert rows["all-reduce"]["exact"]
    assert not rows["local=3"]["exact"]
    first = {name: run.losses[0] for name, run in done.runs.items()}
    assert len({round(loss, 12) for loss in first.values()}) == 1, "all start from the same weights and samples"
    assert len({run.losses[-1] for run in done.runs.values()}) == 3
    with pytest.raises(Exception, match="holds something"):
        compare(tiny(), "all-reduce; local=3", "dp=2", steps=2, out=tmp_path / "runs", quiet=True)


@pytest.mark.whole
@pytest.mark.parametrize("done", [0, 2])
def test_a_way_that_does_not_come_to_its_end_leaves_the_others(tmp_path, monkeypatch, done):
    def some(task, plan, *, steps, **more):
        if not plan.local:
            return train(task, plan, steps=steps, **more)
        if done:
            train(task, plan, steps=done, **more)
        raise NonFiniteLoss(done, 1, math.inf)

    monkeypatch.setattr(importlib.import_module("sheaf.api.compare"), "train", some)
    found = compare(tiny(), "local=3; dp=1", "dp=2", steps=4, out=tmp_path, quiet=True, predict=False)
    assert [len(run.losses) for run in found.runs.values()] == ([done, 4] if done else [4])
    assert list(found.failed) == ["local=3"]
    told = {row["mode"]: row["failed"] for row in found.rows}
    assert told.pop("dp=1") is None
    assert all(f"step {done}" in why for why in told.values())
    assert found.picture.is_file()
    with pytest.raises(NonFiniteLoss):
        compare(tiny(), "local=3; local=4", "dp=2", steps=4, out=tmp_path / "none", quiet=True, predict=False)


@pytest.mark.whole
def test_the_command_prints_a_row_for_each_way(tmp_path, capsys):
    file = tmp_path / "task.py"
    file.write_text(
        "import torch, sheaf\nfrom torch import nn\n"
        "x, y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3\n"
        "task = sheaf.Task(model=lambda: nn.Linear(4, 3),\n"
        "    loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),\n"
        "    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),\n"
        "    data=torch.utils.data.TensorDataset(x, y), batch=8, microbatch=2)\n"
    )
    given = ["train", str(file), "--plan", "dp=2", "--steps", "4", "--compare", "all-reduce; local=2", "--json"]
    given += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="0"):
        main(given)
    out, said = capsys.readouterr()
    told = json.loads(out)
    assert [row["mode"] for row in told["rows"]] == ["all-reduce", "local=2"]
    assert said.index("all-reduce, 1 of 2 ways") < said.index("local=2, 2 of 2 ways")
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--resume"])
    assert "--resume" in capsys.readouterr().err
