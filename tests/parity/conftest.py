"""One thread per run: these models are tiny, and the machine may be busy. One serial side for verdicts on one task."""

import importlib
from dataclasses import fields

import pytest

from sheaf.parity import trial


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(importlib.import_module("sheaf.api.verify"), "_cores", lambda: 1)


@pytest.fixture(scope="session")
def tried_before():
    """Serial trainings by task, steps and microbatch, with the noise that was measured beside them."""
    return []


@pytest.fixture
def shared_trials(tried_before, monkeypatch, tmp_path_factory):
    """A task that is given again is judged by the serial training that it had: a new one is the same to the bit."""
    new = trial.Trial

    def found(task, steps, directory, *, microbatch, device):
        for other, *settings, made in tried_before:
            if settings == [steps, microbatch, device] and _is(task, other):
                return made
        made = new(task, steps, tmp_path_factory.mktemp("trial"), microbatch=microbatch, device=device)
        tried_before.append((task, steps, microbatch, device, made))
        return made

    monkeypatch.setattr(trial, "Trial", found)


def _is(task, other):
    """Whether all parts of two tasks are the same objects, or equal numbers and texts."""
    pairs = [(getattr(task, field.name), getattr(other, field.name)) for field in fields(task)]
    return all(one is two or (isinstance(one, int | float | str) and one == two) for one, two in pairs)
