"""``sheaf bench planner``: one JSON object, or a table."""

import json
from pathlib import Path

import pytest

from sheaf.cli import main

RUNS = Path(__file__).parent.parent.parent / "bench" / "measured" / "runs.jsonl"


@pytest.fixture
def runs(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join([*RUNS.read_text().splitlines()[:12], '{"id": "empty"}']))
    return path


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "planner", *map(str, arguments)])
    return ended.value.code


def test_one_json_object_with_rows_and_a_summary(runs, capsys):
    assert run("--runs", runs, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"rows", "summary"}
    *predicted, last = answer["rows"]
    for one in predicted:
        assert {"id", "predicted_seconds", "predicted_peak_bytes", "terms"} <= set(one)
        assert sum(one["terms"].values()) == pytest.approx(one["predicted_seconds"])
    assert last["id"] == "empty"
    assert "hardware.gpu is absent" in last["refused"]
    assert answer["summary"]["predicted"] == 12
    assert answer["summary"]["seconds"]["all"]["mean"] < 0.1


def test_constants_may_come_from_a_file(runs, capsys):
    assert run("--runs", runs, "--fit", runs, "--json") == 0
    assert json.loads(capsys.readouterr().out)["summary"]["seconds"]["all"]["mean"] < 0.1


def test_people_get_a_table(runs, capsys):
    assert run("--runs", runs) == 0
    out = capsys.readouterr().out
    assert "12 of 13 runs predicted" in out
    assert "vtrain" in out


def test_a_missing_file_is_bad_input(tmp_path, capsys):
    assert run("--runs", tmp_path / "none.jsonl") == 2
    assert "cannot read the runs" in capsys.readouterr().err


def test_constants_are_not_taken_from_a_file_that_says_nothing(runs, tmp_path, capsys):
    (tmp_path / "half.jsonl").write_text('{"id": "half')
    assert run("--runs", runs, "--fit", tmp_path / "half.jsonl") == 2
    assert "none of the 1 rows of" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    ("text", "rows", "told"),
    [
        ('{"id": "a"}\n{"id": "b"}\n', 2, "not one of the 2 runs of {} can be predicted, most often because "),
        ("no json", 1, "not one of the 1 runs of {} can be predicted, most often because line 1 is no JSON"),
        ("\n", 0, "{} holds no runs; wanted one JSON object a line"),
    ],
)
def test_where_nothing_is_predicted_the_answer_comes_and_the_exit_code_says_so(
    text, rows, told, as_json, tmp_path, capsys
):
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    assert run("--runs", path, *(["--json"] if as_json else [])) == 2
    out, err = capsys.readouterr()
    assert told.format(path) in err
    if as_json:
        assert [bool(one["refused"]) for one in json.loads(out)["rows"]] == [True] * rows
    else:
        assert out.startswith(f"0 of {rows} runs predicted")
