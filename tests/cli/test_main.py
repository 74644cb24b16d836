"""The command line: verbs, exit codes, and one JSON object where it is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from sheaf.cli import answer, main, options
from sheaf.cli.answer import Answer
from sheaf.errors import NonFiniteLoss, PlanError, TaskError, WorkerFailed
from sheaf.plans import Plan


def run(*arguments, monkeypatch=None):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


def raising(error):
    @click.command()
    @options.json_option
    def verb(as_json):
        with Answer(as_json=as_json):
            raise error

    return verb


@pytest.fixture
def verb(monkeypatch):
    """Put a command in the place of a verb."""

    def replaced(command, name="known"):
        monkeypatch.setattr(f"sheaf.cli.{name}.{name}", command)

    return replaced


def test_help_names_every_verb(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    for name in ("plan", "train", "verify", "measure", "known"):
        assert f"  {name} " in out


@pytest.mark.parametrize("name", ["plan", "train", "verify", "measure", "known"])
def test_every_verb_has_help_and_json(name, capsys):
    assert run(name, "--help") == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian", "x.py"], "did you mean train?"),
        (["train", "x.py", "--stesp", "3"], "--steps"),
        (["verify", "x.py"], "--plan"),
    ],
)
def test_what_is_mistyped_is_named(arguments, hint, capsys):
    assert run(*arguments) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("verb_name", ["plan", "train", "verify"])
def test_a_file_that_is_not_there(verb_name, tmp_path, capsys):
    arguments = [verb_name, str(tmp_path / "none.py"), *(["--plan", "dp=2"] if verb_name != "plan" else [])]
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no such file" in err
    assert "Traceback" not in err


def test_an_unknown_plan_key_names_the_nearest(capsys):
    assert run("verify", "x.py", "--plan", "dpp=2", "--json") == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "'dpp' is not a key of a plan; did you mean dp?", "kind": "PlanError"}
    assert "did you mean dp?" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TaskError("odd"), 2),
        (PlanError(["odd", "even"]), 2),
        (WorkerFailed("odd"), 1),
        (NonFiniteLoss(3, 1, float("nan")), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_messages_and_codes(error, code, verb, capsys):
    verb(raising(error))
    assert run("known") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert str(error) in err
    assert "Traceback" not in err


def test_only_worker_0_tells_of_bad_input(verb, capsys, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    verb(raising(TaskError("odd")))
    assert run("known", "--json") == 2
    assert capsys.readouterr() == ("", "")
    verb(raising(WorkerFailed("mine alone")))
    assert run("known", "--json") == 1
    assert capsys.readouterr() == ("", "sheaf: worker 1: mine alone\n")


def test_json_is_all_there_is_on_stdout(capsys):
    with Answer(as_json=True) as given:
        print("chatter")
        given.give({"losses": [1.0, float("inf")], "plan": Plan.parse("dp=2")}, lambda _console: None)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"losses": [1.0, None], "plan": "dp=2"}
    assert err == "chatter\n"


def test_json_is_all_there_is_on_stdout_though_other_processes_write_to_it():
    code = (
        "import os, subprocess, sys\n"
        "from sheaf.cli.answer import Answer\n"
        "with Answer(as_json=True) as given:\n"
        "    print('python')\n"
        "    os.write(1, b'descriptor\\n')\n"
        "    subprocess.run(['echo', 'child'])\n"
        "    given.give({'a': 1}, lambda console: None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == '{"a": 1}\n'
    assert sorted(done.stderr.split()) == ["child", "descriptor", "python"]


def test_people_get_text(capsys):
    with Answer(as_json=False) as given:
        given.give({"a": 1}, lambda console: console.print("words " * 30))
    assert capsys.readouterr().out.strip() == ("words " * 30).strip()


def test_a_reader_that_went_away_is_no_traceback(program, tmp_path):
    (tmp_path / "unread.py").write_text(
        "import os\n\nfrom sheaf.cli import main\n\n"
        "read, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\nmain()\n"
    )
    assert program(tmp_path / "unread.py", "known", path=[]).communicate(timeout=120) == ("", "")


def test_python_m_sheaf_is_quick_and_does_not_load_torch():
    code = "import sys; import sheaf.cli.main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert answer.rank() == 0 or "RANK" in os.environ


def test_known_clusters_are_listed(capsys):
    assert run("known") == 0
    assert "h100-dgx: 8 workers on H100" in capsys.readouterr().out
    assert run("known", "--json") == 0
    assert "h100-dgx" in json.loads(capsys.readouterr().out)["known"]


def test_plans_are_read_from_text_and_files(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(Plan.parse("dp=2,zero=1").to_toml())
    assert options.read_plan(str(path)) == options.read_plan("dp=2,zero=1") == Plan.parse("dp=2,zero=1")
    with pytest.raises(PlanError, match=r"did you mean .*plan\.toml"):
        options.read_plan(str(tmp_path / "plam.toml"))
    (tmp_path / "broken.toml").write_text("dp = = 2")
    with pytest.raises(PlanError, match="not TOML"):
        options.read_plan(str(tmp_path / "broken.toml"))


EXAMPLE = os.path.join(os.path.dirname(__file__), "..", "..", "examples", "digits_mlp.py")


def test_train_answers_with_losses_and_says_when_it_was_stopped(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    assert run("train", EXAMPLE, "--plan", "serial", "--steps", "3", "--out", str(out), "--no-predict", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["losses"][0] > values["losses"][-1]
    assert (values["plan"], values["stopped"], values["directory"]) == ("serial", False, str(out))
    assert values["seconds_per_step"] > 0
    assert {"predicted_seconds_per_step"} <= set(values)
    assert (out / "picture.png").is_file()
    assert run("train", EXAMPLE, "--plan", "serial", "--steps", "3", "--out", str(out)) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.whole
def test_verify_answers_and_its_exit_code_is_the_verdict(capsys):
    pytest.importorskip("sklearn")
    assert run("verify", EXAMPLE, "--plan", "dp=2", "--steps", "2", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["verdict"] in ("identical", "rounding")
    assert {"max_loss_error", "max_gradient_error", "max_weight_error", "noise", "first_departure"} <= set(values)


def answered(arguments, stdout):
    """Exit code and standard output of the command on this worker, with the variables that torchrun sets."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    sys.stdout.flush()
    kept, file = os.dup(1), os.open(stdout, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    try:
        code = run(*arguments)
        sys.stdout.flush()
    finally:
        del os.environ["MASTER_ADDR"]
        os.dup2(kept, 1)
        os.close(kept)
        os.close(file)
    return code, Path(stdout).read_text()


def test_of_workers_that_are_there_already_only_the_first_answers(ranks, tmp_path):
    pytest.importorskip("sklearn")
    arguments = ["train", EXAMPLE, "--plan", "dp=2", "--steps", "2", "--out", str(tmp_path / "run")]
    arguments += ["--no-predict", "--json"]

    def mine():
        return answered(arguments, f"{tmp_path}/{os.environ['RANK']}")

    (code, out), other = ranks(mine, 2)
    assert other == (0, "")
    assert code == 0
    assert len(json.loads(out)["losses"]) == 2


@pytest.mark.nightly
@pytest.mark.whole
def test_under_torchrun_only_worker_0_answers(tmp_path):
    pytest.importorskip("sklearn")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    verb = ["-m", "sheaf", "train", EXAMPLE, "--plan", "dp=2", "--steps", "2", "--out", str(tmp_path / "run")]
    verb += ["--no-predict", "--json"]
    done = subprocess.run([*launcher, *verb], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["losses"]) == 2
