"""What accelerators need and a CPU can show: lanes without tags, stand-ins on the device, groups that carry tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from odd_stages import odd
from plain import Run, assert_same, mlp_float64, plain, planned
from torch._subclasses.fake_tensor import FakeTensor

from sheaf import Task
from sheaf.cluster.primitives import backends
from sheaf.errors import PlanError, WorkerFailed
from sheaf.graph import cut
from sheaf.graph.profile import accelerator
from sheaf.parallel import build
from sheaf.parallel.devices import default_device
from sheaf.parallel.lanes import Lanes
from sheaf.parallel.portion import Portion
from sheaf.parallel.post import Post
from sheaf.parallel.stand_ins import StandIns, originals
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.task import Blueprint

HOST, OTHER = torch.device("cpu"), torch.device("meta")  # there need be no accelerator for that one


def test_messages_without_tags_are_taken_by_tag(ranks: Any) -> None:
    def told() -> list[list[float]]:
        lanes, rank = Lanes(World(HOST), heads=9), dist.get_rank()
        sent = {1: [torch.arange(3.0) + rank, torch.tensor(7.0)], 2: [torch.tensor([[1, 2]]) * 3]}
        works = [lanes.start(one, 1 - rank, tag) for tag, one in [(1, sent[1][0]), (2, sent[2][0]), (1, sent[1][1])]]
        rooms = [
            (2, torch.zeros(1, 2, dtype=torch.int64)),
            (1, torch.zeros(3)),
            (1, torch.zeros(())),
        ]  # not in the order in which they are sent
        for tag, room in rooms:
            lanes.coming(room, 1 - rank, tag).wait()
        for work, _ in (one for both in works for one in both):
            work.wait()
        return [room.reshape(-1).tolist() for _, room in rooms]

    for rank, found in enumerate(ranks(told, 2)):
        assert found == [[3, 6], [1.0 - rank, 2.0 - rank, 3.0 - rank], [7.0]]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_message_of_another_size_is_refused(ranks: Any, ahead: bool) -> None:
    def raised() -> str:
        lanes = Lanes(World(HOST), heads=9)
        if dist.get_rank() == 0:
            works = [lanes.start(torch.zeros(4), 1, tag) for tag in (1, 2)]
            dist.barrier()
            del works
            return ""
        try:
            if ahead:  # the first message is put aside by the time it is asked for
                lanes.coming(torch.zeros(4), 0, 2).wait()
            lanes.coming(torch.zeros(3), 0, 1).wait()
        except WorkerFailed as error:
            return str(error)
        finally:
            dist.barrier()
        return "nothing"

    assert "sent 16 bytes, and 12 (3,) were expected" in ranks(raised, 2)[1]


@contextmanager
def through_lanes() -> Iterator[None]:
    """Every message between stages goes as it does between accelerators."""
    made = Post.__init__

    def make(self: Post, world: World, num_stages: int) -> None:
        made(self, world, num_stages)
        self._ahead, self._lanes = False, Lanes(world, heads=4 * num_stages**2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Post, "__init__", make)
        patch.setattr(Post, "_lanes_of", lambda self, _tensor: self._lanes)
        yield


def planned_through_lanes(task: Task, plan: str, steps: int) -> Run | None:
    with through_lanes():
        return planned(task, plan, steps)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("shared", "pp=2:interleaved"),
        ("skips", "pp=3:gpipe"),
        ("skips", "pp=4"),
        ("picked", "pp=2,stages=2:3"),
        ("mlp", "dp=2,pp=2,zero=3,bucket_bytes=1024"),
        ("mlp", "dp=3,*=tp"),
        ("mlp", "pp=2:zero-bubble"),
    ],
)
def test_stages_that_talk_by_lanes_compute_the_serial_answer(ranks: Any, name: str, plan: str) -> None:
    task = mlp_float64() if name == "mlp" else odd(name)
    assert_same(ranks(planned_through_lanes, Plan.parse(plan).workers, task, plan, 2)[0], plain(task, 2), 1e-11)


def test_blocks_of_other_stages_are_stood_in_for_on_the_device() -> None:
    blueprint = Blueprint(mlp_float64())
    blocks = cut(blueprint.model)
    stand_ins = StandIns(blueprint.mode, originals(blocks, blueprint.dtype_of, blueprint.mode, OTHER))
    with blueprint.mode:
        given = (torch.empty(3, 12, device=OTHER, dtype=torch.float64),), {}
    outline = stand_ins.block("0", given, lambda: given)
    assert outline is not None, stand_ins.why
    found = outline.output
    assert (found.device, found.dtype, found.shape) == (OTHER, torch.float64, (3, 17))


def test_parameters_that_are_not_held_stand_on_the_device() -> None:
    blueprint = Blueprint(mlp_float64())
    model = Portion(blueprint, names=()).install(OTHER, lambda _name: pytest.fail("nothing is held"))
    found = {(type(value) is not torch.nn.Parameter or isinstance(value, FakeTensor), value.device.type, value.dtype)
             for value in model.parameters()}  # fmt: skip
    assert found == {(True, "meta", torch.float64)}


@contextmanager
def with_accelerators(count: int) -> Iterator[None]:
    """This process sees so many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
        patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        patch.setattr(torch.accelerator, "device_count", lambda: count)
        patch.setattr(torch.accelerator, "set_device_index", lambda _index: None)
        yield


def test_workers_that_share_an_accelerator_compute_on_the_cpu(ranks: Any) -> None:
    def chosen() -> tuple[str, str, str]:
        with with_accelerators(1):
            try:
                build(mlp_float64(), Plan.parse("dp=2"), device=torch.device("cuda", 0))
            except PlanError as error:
                return default_device().type, accelerator().type, str(error)
        return default_device().type, accelerator().type, "nothing"

    for default, profiled, refused in ranks(chosen, 2):
        assert (default, profiled) == ("cpu", "cpu")
        assert "device cuda:0 was given, and the process group has gloo only" in refused


def test_a_worker_with_an_accelerator_of_its_own_computes_there(ranks: Any) -> None:
    def chosen() -> tuple[torch.device, dict[str, str]]:
        with with_accelerators(2), pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
            patch.setenv("LOCAL_RANK", str(dist.get_rank()))
            return default_device(), backends()

    both = {"cpu": "gloo", "cuda": "nccl"}
    assert ranks(chosen, 2) == [(torch.device("cuda", 0), both), (torch.device("cuda", 1), both)]


def test_a_group_that_carries_no_tensors_of_the_host_is_refused(ranks: Any) -> None:
    def refused() -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
            try:
                build(mlp_float64(), Plan.parse("dp=2"), device=torch.device("cuda", 0))
            except PlanError as error:
                return str(error)
        return "nothing"

    assert all("use init_process_group('cpu:gloo,cuda:nccl')" in told for told in ranks(refused, 2))


def test_an_accelerators_waits_are_counted_when_they_are_over() -> None:
    world, done = World.alone(), list[float]()
    world.device = OTHER

    def moment(at: float) -> Any:
        return SimpleNamespace(at=at, synchronize=lambda: done.append(at))

    moments = iter([moment(1.0), moment(3.5), moment(4.0), moment(4.25)])
    vars(world)["_clock"] = SimpleNamespace(now=lambda: next(moments), seconds=lambda start, end: end.at - start.at)
    for _ in range(2):
        with world.waiting():
            pass
    assert not done
    assert world.waited_seconds == 2.75
    assert sorted(done) == [3.5, 4.25]
