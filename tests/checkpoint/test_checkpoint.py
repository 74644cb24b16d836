"""Checkpoints: whole or absent, at every moment, and only for the plan they were saved under."""

import json
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheaf import checkpoint
from sheaf.checkpoint import files
from sheaf.errors import RunError
from sheaf.plans import Plan


class Numbers:
    """A step that is only numbers."""

    def __init__(self, index=0, plan=None, rank=0, workers=1, value=0.0):
        self.index, self.plan, self.rank, self.workers = index, plan or Plan(), rank, workers
        flat = torch.arange(6.0) + value
        self.tensors = {
            "flat.a": flat[:2],  # slices of one buffer, as sharded states are
            "flat.b": flat[2:],
            "empty": torch.empty(0),
            "scalar": torch.tensor(value, dtype=torch.float64),
            "half": torch.full((2, 2), value, dtype=torch.bfloat16).t(),
            "count": torch.tensor([index]),
        }
        self.loaded = None

    def state(self):
        return self.tensors, {"index": self.index, "scheduler": {"last_epoch": 3}}

    def load(self, tensors, values):
        self.loaded = tensors, values


def test_what_is_saved_is_loaded(tmp_path):
    step = Numbers(7, value=0.5)
    path = checkpoint.save(step, tmp_path)
    assert path == tmp_path / "checkpoints" / "step_000007"
    assert checkpoint.latest(tmp_path) == checkpoint.Found(path)
    checkpoint.load(step, path)
    tensors, values = step.loaded
    assert values == {"index": 7, "scheduler": {"last_epoch": 3}}
    assert tensors.keys() == step.tensors.keys()
    assert all(torch.equal(tensors[name], step.tensors[name]) for name in tensors)
    assert all(tensors[name].dtype == step.tensors[name].dtype for name in tensors)


@pytest.mark.parametrize("most_bytes", [0, 100])
def test_where_nothing_more_can_be_written_the_older_one_is_named(tmp_path, most_bytes):
    older = checkpoint.save(Numbers(7), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        with pytest.raises(RunError, match=rf"the last whole checkpoint is {older}: make room"):
            checkpoint.save(Numbers(8), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.latest(tmp_path) == checkpoint.Found(older)
    assert checkpoint.save(Numbers(8), tmp_path) == files.step_path(tmp_path, 8)


def test_only_the_newest_are_kept(tmp_path):
    for index in (8, 9, 10, 11):
        checkpoint.save(Numbers(index), tmp_path, keep=2)
    assert [path.name for path in files.saved(tmp_path)] == ["step_000011", "step_000010"]


@pytest.mark.parametrize("other", [Numbers(plan=Plan(recompute="full")), Numbers(workers=2)])
def test_another_plan_or_number_of_workers_is_refused(tmp_path, other):
    path = checkpoint.save(Numbers(3), tmp_path)
    with pytest.raises(RunError, match=r"saved under serial by 1 workers.*resume with that plan"):
        checkpoint.load(other, path)


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", range(30))
def test_a_crash_at_any_moment_leaves_the_older_one(tmp_path, monkeypatch, moment):
    checkpoint.save(Numbers(1), tmp_path, keep=1)
    calls = 0

    def crashing(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == moment:
                raise Crash
            return real(*args, **kwargs)

        return call

    # Everything a save does to the disk passes through these, in between and before.
    for name in ("save_file", "_flushed", "write_json", "write_tensors", "rename", "prune", "described"):
        monkeypatch.setattr(files, name, crashing(getattr(files, name)))
    monkeypatch.setattr(files.shutil, "rmtree", crashing(files.shutil.rmtree))
    crashed = False
    try:
        checkpoint.save(Numbers(2), tmp_path, keep=1)
    except Crash:
        crashed = True
    monkeypatch.undo()
    found = checkpoint.latest(tmp_path)
    assert found.path is not None
    assert found.skipped == ()
    assert found.path.name in ("step_000001", "step_000002")
    step = Numbers(plan=Plan())
    checkpoint.load(step, found.path)
    assert f"step_{step.loaded[1]['index']:06d}" == found.path.name
    assert crashed == (1 <= moment <= calls)
    checkpoint.save(Numbers(3), tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000003"]


def test_the_crash_test_covers_a_whole_save(tmp_path, monkeypatch):
    moments = 0
    for name in ("save_file", "_flushed", "write_json", "write_tensors", "rename", "prune", "described"):
        real = getattr(files, name)

        def counted(*args, real=real, **kwargs):
            nonlocal moments
            moments += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(files, name, counted)
    checkpoint.save(Numbers(2), tmp_path)
    assert 10 <= moments < 26


@settings(deadline=None, max_examples=30)
@given(position=st.integers(0, 10_000), cut=st.booleans())
def test_any_damage_is_noticed(tmp_path_factory, position, cut):
    directory = tmp_path_factory.mktemp("damage")
    older = checkpoint.save(Numbers(1), directory)
    newer = checkpoint.save(Numbers(2), directory)
    file = sorted(path for path in newer.iterdir() if path.name != files.MANIFEST)[position % 2]
    content = bytearray(file.read_bytes())
    place = position % len(content)
    if cut:
        content = content[:place]
    else:
        content[place] ^= 1
    file.write_bytes(content)
    found = checkpoint.latest(directory)
    assert found.path == older
    assert len(found.skipped) == 1
    assert file.name in found.skipped[0]


def test_no_manifest_no_checkpoint(tmp_path):
    path = checkpoint.save(Numbers(1), tmp_path)
    (path / files.MANIFEST).write_text("{")
    assert checkpoint.latest(tmp_path).path is None
    (path / files.MANIFEST).write_text(json.dumps({"step": 1}))
    assert "not a manifest" in checkpoint.latest(tmp_path).skipped[0]
    (path / files.MANIFEST).unlink()
    assert "was not finished" in checkpoint.latest(tmp_path).skipped[0]
    assert checkpoint.latest(tmp_path / "nowhere") == checkpoint.Found(None)


def test_a_damaged_one_is_written_again_and_a_whole_one_is_left(tmp_path):
    path = checkpoint.save(Numbers(1), tmp_path)
    written = (path / files.MANIFEST).stat().st_mtime_ns
    checkpoint.save(Numbers(1), tmp_path)
    assert (path / files.MANIFEST).stat().st_mtime_ns == written
    (path / "worker_0.safetensors").write_bytes(b"")
    checkpoint.save(Numbers(1), tmp_path)
    assert checkpoint.latest(tmp_path) == checkpoint.Found(path)


def test_values_that_json_does_not_know_are_refused(tmp_path):
    step = Numbers(1)
    step.state = lambda: ({}, {"scheduler": object()})
    with pytest.raises(RunError, match="what JSON knows"):
        checkpoint.save(step, tmp_path)


def test_every_worker_saves_its_own(ranks, tmp_path):
    def save_and_load(directory):
        import torch.distributed as dist

        rank = dist.get_rank()
        step = Numbers(4, plan=Plan(dp=2), rank=rank, workers=2, value=rank + 1.0)
        path = checkpoint.save(step, directory)
        checkpoint.load(step, path)
        return step.loaded[0]["scalar"].item(), sorted(file.name for file in path.iterdir())

    listing = ["manifest.json", "worker_0.json", "worker_0.safetensors", "worker_1.json", "worker_1.safetensors"]
    assert ranks(save_and_load, 2, tmp_path) == [(1.0, listing), (2.0, listing)]


def test_the_first_worker_tells_the_others(ranks):
    def tell():
        import torch.distributed as dist

        def first():
            assert dist.get_rank() == 0
            return {"path": "x", "n": [1, None]}

        def refuse():
            raise RunError("taken")

        value = checkpoint.from_first(first)
        with pytest.raises(RunError, match="taken"):
            checkpoint.from_first(refuse)
        return value

    assert ranks(tell, 2) == [{"path": "x", "n": [1, None]}] * 2
