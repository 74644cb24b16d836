"""A run puts the machine's figures right, and only a run of this machine that was predicted from them."""

import json
from dataclasses import replace

import pytest

from sheaf.api import feedback
from sheaf.api.feedback import from_run, right
from sheaf.cli import main
from sheaf.cluster import Cluster, Device, Host, Link, Timing, read, write
from sheaf.cost.communication import exposed
from sheaf.errors import ClusterError, RunError
from sheaf.plans import Plan
from sheaf.record import Record, StepReport

DEVICE = Device(
    name="core", kind="cpu", flops_per_second={"fp32": 1e10}, memory_bytes_per_second=1e10, memory_bytes=2**30
)
HOST = Host(name="one", count=1, workers=2, device=DEVICE, cores=2, memory_bytes=2**30)
LINK = Link(
    name="here",
    latency_seconds=1e-4,
    bytes_per_second=1e8,
    timings=(Timing(operation="all_reduce", workers=2, size_bytes=2**20, seconds=0.02),),
)
CLUSTER = Cluster(name="one", backend="gloo", hosts=(HOST,), intra=LINK, overlap=0.5)
SLOW = replace(HOST, name="two", workers=1)
PAIR = replace(CLUSTER, hosts=(replace(HOST, workers=1), SLOW), inter=replace(LINK, name="between"))


def terms(**pairs):
    return {term: {"predicted": predicted, "measured": measured} for term, (predicted, measured) in pairs.items()}


def reports(count=4, computed=(0.1, 0.1), microbatches=(4, 4), seconds=0.19):
    return [
        StepReport(
            step=step, loss=1.0, weight=8.0, samples=8, seconds=seconds, computed=computed, microbatches=microbatches,
            terms={"compute": computed[0], "communicate": 0.06, "host": 0.03},
        )
        for step in range(count)
    ]  # fmt: skip


def test_what_nothing_could_hide_is_the_links():
    found = right(CLUSTER, Plan(dp=2, zero=1), terms(communicate=(0.02, 0.06)), 0.0, reports())
    assert found.overlap == CLUSTER.overlap
    assert found.intra.bytes_per_second == pytest.approx(LINK.bytes_per_second / 3, rel=1e-3)
    assert found.intra.timings[0].seconds == pytest.approx(0.06)


@pytest.mark.parametrize("measured", [0.025, 0.035, 0.055])
def test_what_could_hide_is_overlap_and_the_same_run_is_then_predicted_as_measured(measured):
    pieces = [0.02, 0.02, 0.01]  # the last has nothing to hide behind
    shown = exposed(pieces, 1.0, CLUSTER.overlap)
    found = right(CLUSTER, Plan(dp=2), terms(communicate=(shown, measured)), sum(pieces) - shown, reports())
    assert exposed(pieces, 1.0, found.overlap) == pytest.approx(measured, rel=1e-3)
    assert found.intra == LINK


def test_what_overlap_cannot_explain_is_the_links():
    pieces = [0.02, 0.02, 0.01]
    shown = exposed(pieces, 1.0, CLUSTER.overlap)
    found = right(CLUSTER, Plan(dp=2), terms(communicate=(shown, 0.39)), sum(pieces) - shown, reports())
    slower = LINK.bytes_per_second / found.intra.bytes_per_second
    assert found.overlap == -2.0
    assert slower > 2
    assert exposed([slower * piece for piece in pieces], 1.0, found.overlap) == pytest.approx(0.39, rel=1e-3)


def test_hosts_are_as_fast_as_they_computed_and_the_link_between_them_is_blamed():
    given = reports(computed=(0.1, 0.3), microbatches=(4, 6))
    found = right(PAIR, Plan(dp=2), terms(communicate=(0.02, 0.01)), 0.0, given)
    assert [host.speed for host in found.hosts] == [1.0, pytest.approx(0.025 / 0.05)]
    assert found.inter.bytes_per_second == pytest.approx(2 * LINK.bytes_per_second, rel=1e-3)
    assert found.intra == LINK


def test_what_a_step_takes_on_the_host_is_added():
    found = right(CLUSTER, Plan(), terms(host=(0.01, 0.03)), 0.0, reports())
    assert found.host_seconds == pytest.approx(0.02)
    assert right(found, Plan(), terms(host=(0.03, 0.005)), 0.0, reports()).host_seconds == 0.0


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The machine's measurement, in a file of its own."""
    path = tmp_path / "kept.toml"
    write(CLUSTER, path)
    monkeypatch.setattr(feedback, "measure", lambda workers, quick: read(path))
    monkeypatch.setattr(feedback, "kept_file", lambda workers: path)
    return path


def run_of(directory, kept, *, steps=4, predicted=0.02, **on):
    directory.mkdir()
    record = Record(directory / "record.jsonl")
    told = feedback.machine() | {"workers": 2, "figures": feedback.digest(read(kept))} | on
    seconds = {"compute": 0.1, "all_gather": predicted, "host": 0.03}
    record.event("plan", plan="dp=2,zero=1", predicted=seconds, hidden_seconds=0.0, on=told)
    for report in reports(steps):
        record.step(report)
    record.close()
    return directory


def test_a_run_puts_right_what_is_kept_once(tmp_path, kept):
    cluster, changes = from_run(run_of(tmp_path / "run", kept), out=tmp_path / "mine.toml")
    assert [change.figure for change in changes if change.figure.endswith("bytes_per_second")] == [
        "intra.bytes_per_second"
    ]
    assert read(kept) == read(tmp_path / "mine.toml") == cluster
    assert "put right by run run" in cluster.source
    with pytest.raises(ClusterError, match="other figures"):
        from_run(tmp_path / "run")


def test_a_run_as_predicted_changes_nothing(tmp_path, kept, capsys):
    directory = run_of(tmp_path / "run", kept, predicted=0.06)
    assert from_run(directory) == (CLUSTER, ())
    with pytest.raises(SystemExit, match="0"):
        main(["measure", "--from-run", str(directory)])
    assert f"nothing changed: {directory} shows no other figures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"host": "elsewhere", "cores": 96}, ClusterError, "another machine.*host elsewhere.*cores 96"),
        ({"steps": 2}, RunError, "2 steps"),
        ({"predicted": 0.0, "steps": 0}, RunError, "no prediction"),
    ],
)
def test_runs_that_say_nothing_of_this_machine_are_refused(tmp_path, kept, changes, kind, words):
    before = kept.read_bytes()
    with pytest.raises(kind, match=words):
        from_run(run_of(tmp_path / "run", kept, **changes))
    assert kept.read_bytes() == before


def test_the_verb_prints_before_and_after(tmp_path, kept, capsys):
    directory = run_of(tmp_path / "run", kept)
    with pytest.raises(SystemExit):
        main(["measure", "--from-run", str(directory), "--json"])
    told = json.loads(capsys.readouterr().out)
    change = next(one for one in told["changes"] if one["figure"] == "intra.bytes_per_second")
    assert change["before"] == 1e8
    assert change["after"] == pytest.approx(1e8 / 3, rel=1e-3)
    (tmp_path / "again").mkdir()
    with pytest.raises(SystemExit):
        main(
            [
                "measure",
                "--from-run",
                str(run_of(tmp_path / "again" / "run", kept)),
                "--out",
                str(tmp_path / "out.toml"),
            ]
        )
    shown = capsys.readouterr().out
    assert "before" in shown
    assert "intra.bytes_per_second" in shown
