"""What was measured while other programs ran is told of as such, and measured again when the machine is quiet."""

import io
import re
from dataclasses import replace

import made
import pytest
import small
from rich.console import Console

from sheaf.api import profiles as module
from sheaf.api.choice import choose
from sheaf.api.profiles import busy_note, measured_profiles
from sheaf.cli.plan import show
from sheaf.search import Question, search

FACTS = made.facts(4)
PROFILE = made.profile(FACTS, concurrency=2)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of which others take cores, call by call, and whether it is quiet in between."""
    taken, asked = [], []

    def run(function, workers, given, facts, *_, **__):
        asked.append(len(facts))
        return [[replace(PROFILE, cores_taken=cores) for _ in facts] for cores in (0.0, taken.pop(0))]

    monkeypatch.setenv("SHEAF_CACHE", str(tmp_path))
    monkeypatch.setattr(module.launch, "run", run)
    monkeypatch.setattr(module, "quiet", lambda: machine_is["quiet"])
    machine_is = {"quiet": False}
    return taken, asked, machine_is


def test_what_a_busy_machine_took_is_measured_again_once_it_is_quiet(machine):
    taken, asked, machine_is = machine
    task = small.SMALL["mlp"]()

    said = []

    def measured():
        (found,) = measured_profiles(task, [FACTS], 2, say=said.append)
        return found.cores_taken

    taken += [1.0]
    assert measured() == 1.0
    assert measured() == 1.0, "it would be no better now"
    assert asked == [1]
    machine_is["quiet"] = True
    taken += [1.5, 0.1]
    assert measured() == 1.0, "the calmer of two that were both disturbed"
    assert measured() == 0.1
    assert measured() == 0.1
    assert asked == [1, 1, 1]
    new = "measuring the model's blocks on 2 workers"
    again = f"{new} again, as other programs kept the cores busy before"
    kept = r"the model's blocks on 2 workers: measured \d.* s ago \(`sheaf plan --fresh` measures again\)"
    expected = [new, kept, kept, again, kept, again, kept]
    assert len(said) == len(expected)
    assert all(map(re.fullmatch, expected, said)), said


def test_what_is_kept_is_measured_again_when_that_is_asked_for(machine):
    taken, asked, _ = machine
    taken += [0.0, 0.0]
    said = []
    for fresh in (False, False, True):
        measured_profiles(small.SMALL["mlp"](), [FACTS], 2, fresh=fresh, say=said.append)
    assert asked == [1, 1]
    assert [line.startswith("measuring ") for line in said] == [True, False, True]


def test_a_plan_of_a_busy_machine_says_so():
    profiles = {(4, 1): replace(PROFILE, cores_taken=0.1), (4, 2): replace(PROFILE, cores_taken=0.8)}
    question = Question(batch=8, facts={4: FACTS}, cluster=made.cluster(2), microbatch=4, profiles=profiles)
    told = {}
    for name, asked in (("busy", question), ("quiet", replace(question, profiles=dict.fromkeys(profiles, PROFILE)))):
        ranking = search(asked)
        console = Console(width=120, file=io.StringIO())
        show(ranking, None, console)
        told[name] = ranking.to_dict()["cores_taken"], console.file.getvalue()
    assert told["busy"][0] == 0.8
    assert busy_note(profiles.values()) in told["busy"][1]
    assert "other programs kept 0.8 of the workers' cores busy" in told["busy"][1]
    assert told["quiet"][0] == 0.0
    assert "other programs" not in told["quiet"][1]


def test_a_plan_that_is_chosen_on_a_busy_machine_says_so_once(monkeypatch):
    busy = {(4, 1): replace(PROFILE, cores_taken=0.7), (4, 2): PROFILE}
    ranking = search(Question(batch=8, facts={4: FACTS}, cluster=made.cluster(2), microbatch=4, profiles=busy))
    monkeypatch.setattr("sheaf.api.plan.plan", lambda *_, **__: ranking)
    lines = list[str]()
    given = {"world": None, "workers": 2, "resumed": None, "allow_relaxed": False, "source": None}
    plan, _ = choose(small.SMALL["mlp"](), None, note=lines.append, **given)
    assert plan == ranking.best.plan
    assert lines == [busy_note(busy.values())]
