"""What users get wrong: each is told in words and exit code 2, and no worker is started for it."""

import json
import sys

import pytest

from sheaf.checkpoint import latest
from sheaf.cli import main
from sheaf.training.directory import claimed

PRELUDE = """
import torch
from torch import nn
from sheaf.task import Loss, Task

def rows(count=12):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 4, generator=generator)
    return list(zip(inputs, inputs.sum(1, keepdim=True)))

def loss(output, batch):
    return nn.functional.mse_loss(output, batch[1])

def make(**changed):
    settings = {"model": lambda: nn.Linear(4, 1), "loss": loss, "data": rows(), "batch": 6, "microbatch": 2,
                "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01)}
    return Task(**settings | changed)
"""
GOOD = "task = make"
TRAIN, VERIFY = ("train", "--plan", "dp=2"), ("verify", "--plan", "dp=2")
PLAN = ("plan", "--cluster", "h100-dgx")
EVERY = (TRAIN, VERIFY, PLAN)
GONE = """
class Gone(list):
    def __getitem__(self, index):
        if index == GONE:
            raise OSError("disk gone")
        return super().__getitem__(index)
def task():
    return make(data=Gone(rows()), shuffle=False)
"""
WEIGHTS = """
from safetensors.torch import save_file
def task():
    save_file({"weight": torch.zeros(3, 3), "odd": torch.zeros(1)}, "w.safetensors")
    return make(weights="w.safetensors")
"""


@pytest.fixture
def sheaf(tmp_path, monkeypatch, capsys):
    """Run a verb on a file with this text; gives exit code, standard output and standard error."""
    modules, path_before = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)

    def run(text, verb, *more):
        (tmp_path / "mine.py").write_text(PRELUDE + text)
        sys.modules.pop("sheaf_file_mine", None)
        with pytest.raises(SystemExit) as ended:
            main([verb[0], "mine.py", *verb[1:], *more])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    yield run
    sys.path[:] = path_before
    for name in set(sys.modules) - modules:
        if name.startswith("sheaf_file_"):
            del sys.modules[name]


@pytest.fixture
def _no_worker_starts(monkeypatch):
    def started(*_arguments, **_settings):
        pytest.fail("a worker was started")

    monkeypatch.setattr("sheaf.launch.run", started)


@pytest.mark.usefixtures("_no_worker_starts")
@pytest.mark.parametrize(
    ("text", "verbs", "words"),
    [
        ("x = 3", EVERY, ["mine.py has no 'task'", "write mine.py:NAME"]),
        (GOOD, [("train", "--plan", "dp=3", "--workers", "2")], ["dp=3 needs 3 workers, there are 2", "lower dp"]),
        (
            GOOD,
            [("train", "--plan", "dp=2,server=2:apart", "--workers", "3")],
            ["needs 4 workers (2 that compute, 2 that only serve), there are 3"],
        ),
        (GOOD, [("train", "--plan", "dp=4"), ("verify", "--plan", "dp=4")], ["3 microbatches of 2", "dp=3"]),
        (
            GOOD,
            [("train", "--plan", "dp=2,zer=1"), ("verify", "--plan", "dp=2,zer=1")],
            ["'zer' is not a key of a plan", "did you mean zero?"],
        ),
        (GOOD, [("train", "--plan", "dp=2,microbatch=3")], ["microbatch=3", "microbatch=2"]),
        (GOOD, [("train", "--plan", "dp=two")], ["dp=two", "whole number"]),
        ("def task(): return make(microbatch=7)", EVERY, ["microbatch=7 is larger than batch=6", "lower it"]),
        ("def task(): return make(data=[])", EVERY, ["data (list) is empty"]),
        (GONE.replace("GONE:", "0:"), EVERY, ["data[0] raised OSError: disk gone"]),
        (GONE.replace("GONE:", "1:"), EVERY, ["data[1] raised OSError: disk gone"]),
        (
            "def task(): return make(model=lambda: nn.Sequential(nn.Linear(4, 1 << 40), nn.Linear(1 << 40, 1)))",
            [("train",), TRAIN, ("train", "--plan", "dp=2,zero=3")],
            ["the model does not fit", "TiB of parameters", "memory"],
        ),
        (WEIGHTS, [TRAIN, VERIFY], ["hold no bias", "hold odd", "weight with shape (3, 3); the model wants (1, 4)"]),
        ("def task(): return make(weights='none.safetensors')", EVERY, ["no such file"]),
        ("def task(): return make(model=lambda: 3)", EVERY, ["it must return a torch.nn.Module"]),
        ("def task(): return make(optimizer=lambda p: None)", [TRAIN], ["it must return a torch.optim.Optimizer"]),
        ("def task(): return make(loss=lambda o, b: 3.0)", [TRAIN, PLAN], ["the loss function returned float"]),
        ("def task(): return make(loss=lambda o, b: o)", [TRAIN, PLAN], ["a tensor of shape (2, 1)"]),
        ("def task(): return make(model=lambda: nn.Linear(5, 1))", [TRAIN, PLAN], ["cannot be multiplied", "(2x4"]),
        ("def task(): return make(precision='fp8')", EVERY, ["precision='fp8': did you mean"]),
        (
            "def task(): return make(optimiser=3)",
            EVERY,
            ["'optimiser' is not a field of a task; did you mean optimizer?"],
        ),
        ("def task(): return make(scheduler=lambda o: None)", EVERY, ["scheduler() returned None", "has no step()"]),
        ("def task(): return make(data=[(x, 'a') for x, _ in rows()])", [TRAIN, PLAN], ["float32[2, 4], 2 texts"]),
        (GOOD, [("train", "--resume")], ["--out"]),
        (GOOD, [("train", "--plan", "nowhere.toml")], ["nowhere.toml cannot be read"]),
        (GOOD, [("plan", "--cluster", "h100-dgq")], ["did you mean h100-dgx?"]),
    ],
)
def test_bad_input_is_told_before_a_worker_starts(sheaf, tmp_path, text, verbs, words):
    for verb in verbs:
        code, out, err = sheaf(text, verb)
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        for word in words:
            assert word in err, verb
        assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("_no_worker_starts")
@pytest.mark.parametrize("verb", EVERY)
def test_with_json_the_message_is_json_too(sheaf, verb):
    code, out, _ = sheaf("x = 3", verb, "--json")
    assert code == 2
    told = json.loads(out)
    assert told["kind"] == "TaskError"
    assert "has no 'task'" in told["error"]


@pytest.mark.usefixtures("_no_worker_starts")
def test_files_of_plans_and_clusters_are_named_with_every_mistake(sheaf, tmp_path):
    (tmp_path / "p.toml").write_text("dpp = 2\nzero = 'x'\n")
    code, _, err = sheaf(GOOD, ("train", "--plan", "p.toml"))
    assert code == 2
    assert "p.toml: 'dpp' is not a key of a plan; did you mean dp?" in err
    assert "p.toml: zero=x is not a whole number" in err
    (tmp_path / "q.toml").write_text("dp = = 2")
    assert "q.toml: the plan is not TOML" in sheaf(GOOD, ("verify", "--plan", "q.toml"))[2]
    (tmp_path / "c.toml").write_text("name = 'mine'\nbackend = 'gloo'\n[[hosts]]\nname = 'a'\nworkrs = 2\n")
    code, _, err = sheaf(GOOD, ("plan", "--cluster", "c.toml"))
    assert code == 2
    assert "c.toml: hosts[0].device is missing" in err
    assert "did you mean workers?" in err


@pytest.mark.usefixtures("_no_worker_starts")
@pytest.mark.parametrize("plan", ["dp=2", "auto"])
def test_a_directory_that_holds_a_run_is_refused(sheaf, tmp_path, plan):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "record.jsonl").write_text("")
    code, _, err = sheaf(GOOD, ("train", "--plan", plan, "--out", "used"))
    assert code == 2
    assert "used already holds a run; choose another --out, or continue that run with --resume" in err


@pytest.mark.usefixtures("_no_worker_starts")
def test_a_run_that_is_still_going_on_is_not_resumed(sheaf, tmp_path):
    resumed = ("train", "--plan", "serial", "--no-predict", "--steps", "2", "--out", "used", "--resume")
    assert sheaf(GOOD, resumed)[0] == 0
    with claimed(tmp_path / "used"):
        code, _, err = sheaf(GOOD, resumed)
    assert code == 2
    assert "used holds a run that is still going on" in err
    assert sheaf(GOOD, resumed)[0] == 0


@pytest.mark.usefixtures("_no_worker_starts")
def test_a_loss_that_is_no_number_is_told_with_step_microbatch_and_checkpoint(sheaf, tmp_path):
    text = """
def breaks(output, batch):
    return loss(output, batch) * (float("nan") if (batch[0] == rows()[9][0]).all(1).any() else 1.0)
def task():
    return make(loss=breaks, shuffle=False)
"""
    code, _, err = sheaf(text, ("train", "--plan", "serial", "--no-predict", "--save-every", "1", "--out", "run"))
    assert code == 1
    assert "the loss of microbatch 1 at step 1 is nan; the step was not applied" in err
    assert "run/checkpoints/step_000001 is kept; --resume goes on from there" in err
    assert latest(tmp_path / "run").path.name == "step_000001"


def test_wrong_types_are_all_told(program, tmp_path):
    # In a process of its own: here, in the tests, beartype would speak first.
    (tmp_path / "mine.py").write_text(PRELUDE + "def task(): return make(model=nn.Linear(4, 1), loss=3)\n")
    (tmp_path / "sheaf_itself.py").write_text("from sheaf.cli import main\n\nmain()\n")
    command = ["train", str(tmp_path / "mine.py"), "--plan", "dp=2"]
    sheaf = program(tmp_path / "sheaf_itself.py", *command, path=[])
    told, complaints = sheaf.communicate(timeout=120)
    assert (sheaf.returncode, told) == (2, "")
    assert "- model is a module, Linear, that is built already; Sheaf calls model()" in complaints
    assert "- loss is 3; it must be callable" in complaints
    assert "Traceback" not in complaints


SPARSE = """
class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 1)
    def forward(self, given):
        return self.layer(self.table(given[:, :1].long().abs())[:, 0])
def task():
    return make(model=Mixed, optimizer=lambda parameters: torch.optim.SparseAdam(CHOSEN))
"""


@pytest.mark.usefixtures("_no_worker_starts")
@pytest.mark.parametrize("verb", EVERY)
def test_dense_gradients_for_an_optimizer_of_rows_are_told_before_a_worker_starts(sheaf, verb):
    code, out, err = sheaf(SPARSE.replace("CHOSEN", "list(parameters)"), verb)
    assert code == 2
    assert out == ""
    assert "layer.weight (2 parameters in all) got a dense gradient, and SparseAdam steps only by those that" in err


def test_an_optimizer_of_rows_for_the_table_alone_trains(sheaf, tmp_path):
    trained = ("train", "--plan", "serial", "--no-predict", "--steps", "2", "--out", "run")
    code, _, err = sheaf(SPARSE.replace("CHOSEN", "list(parameters)[:1]"), trained)
    assert code == 0, err


@pytest.mark.usefixtures("_no_worker_starts")
def test_how_the_run_of_a_directory_ended_is_told_with_what_to_do(sheaf, tmp_path):
    started, continued = ("train", "--plan", "serial", "--no-predict", "--out", "used"), "or continue that run with"
    assert sheaf(GOOD, (*started, "--steps", "3"))[0] == 0
    ended = sheaf(GOOD, (*started, "--steps", "4"))[2]
    assert (
        f"used already holds a run that came to its end, 3 of 3 steps done; choose another --out, {continued}" in ended
    )
    assert "--resume and more --steps" in ended
    record = tmp_path / "used" / "record.jsonl"
    lines = [line for line in record.read_text().splitlines() if json.loads(line)["kind"] not in ("end", "compared")]
    for last, told in (
        ("", "that broke off, 3 of 3 steps done"),
        ('{"kind": "end", "step": 3, "stopped": true}', "that was stopped, 3 of 3 steps done"),
        ('{"kind": "failed", "error": "DataError", "message": "no\\nmore"}', "that failed, 3 of 3 steps done (no)"),
        ('{"kind": "start", "step": 3, "steps": 9}', "that broke off, 3 of 9 steps done"),
    ):
        record.write_text("\n".join([*lines, last]))
        err = sheaf(GOOD, started)[2]
        assert f"used already holds a run {told}; choose another --out, {continued} --resume\n" in err
    with claimed(tmp_path / "used"):
        code, _, err = sheaf(GOOD, started)
    assert code == 2
    assert "used holds a run that is still going on, 3 of 9 steps done; choose another --out, wait for its end" in err


@pytest.mark.usefixtures("_no_worker_starts")
def test_a_resumed_run_that_is_done_says_so_and_one_that_is_refused_is_not_told_to_resume(sheaf):
    started = ("train", "--no-predict", "--out", "done", "--resume", "--steps")
    assert "nothing was left" not in sheaf(GOOD, (*started, "3", "--plan", "serial"))[1]
    code, out, _ = sheaf(GOOD, (*started, "2"))
    assert code == 0
    assert "nothing was left to do: 3 steps are done, and --steps counts all of them; give more" in out
    code, _, err = sheaf(GOOD, (*started, "4", "--plan", "recompute=full"))
    assert code == 2
    assert "resume with that plan" in err
    assert "is kept" not in err
