"""Where shares of the batch are weighted, so are ZeRO's shards: the answer is the serial one, and checkpoints go on."""

import functools

import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned
from torch import nn

from sheaf.cluster.cluster import Link
from sheaf.cost.communication import Fabric

STEPS = 4
SIZES = (5, 0, 3)


class Tempered(nn.Module):
    """A parameter with fewer numbers than there are workers, beside layers whose sizes nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 17), nn.Linear(17, 5)
        self.temperature = nn.Parameter(torch.tensor([1.5]))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(given) * self.temperature))


def tempered():
    return mlp_float64(model=Tempered, clip=0.5)


@functools.cache
def reference():
    return plain(tempered(), STEPS)


def kept(step):
    """How many numbers of a moment each worker's optimizer keeps, and whole, all that they keep (gathered)."""
    slices = step._holding.slices
    mine = {
        (name, piece.start): {key: value.clone() for key, value in step.optimizer.state[tensor].items()}
        | {"value": tensor.detach().clone()}
        for name, (tensor, piece) in slices.items()
    }
    everyone = [None] * step.workers
    torch.distributed.all_gather_object(everyone, mine)
    counts = [sum(state["exp_avg"].numel() for state in each.values()) for each in everyone]
    whole = {}
    for (name, _), state in sorted((one for each in everyone for one in each.items()), key=lambda one: one[0]):
        for key, value in state.items():
            whole.setdefault((name, key), []).append(value.reshape(-1))
    return counts, {
        key: parts[0] if key[1] == "step" else torch.cat(parts).contiguous() for key, parts in whole.items()
    }


@pytest.mark.parametrize(
    "text",
    [
        "dp=2,zero=1,shares=2:1",
        "dp=3,zero=1,shares=3:1:2",
        "dp=3,zero=2,shares=3:1:2,bucket_bytes=1024",
        "dp=3,zero=3,shares=0:2:1,bucket_bytes=1024",
        "dp=2,shares=stolen,zero=1,shards=3:1",
        "dp=3,shares=1:2:3,zero=1,shards=3:0:1",
        "dp=2,shares=balanced,zero=3,shards=1:4,bucket_bytes=1024",
    ],
)
def test_weighted_shards_compute_the_serial_answer(ranks, text):
    assert_same(ranks(planned, int(text[3]), tempered(), text, STEPS)[0], reference(), 1e-12)


@pytest.mark.parametrize("text", ["dp=2,tp=2,zero=1,shares=1:3", "dp=2,pp=2,zero=3,shares=3:1,bucket_bytes=1024"])
def test_replicas_of_several_workers_cut_shards_by_their_share(ranks, text):
    task = mlp_float64(clip=0.5)
    assert_same(ranks(planned, 4, task, text, 2)[0], plain(task, 2), 1e-12)


def saved(text, directory, steps):
    from sheaf import checkpoint
    from sheaf.parallel import build
    from sheaf.plans import Plan

    step = build(tempered(), Plan.parse(text))
    for _ in range(steps):
        step()
    checkpoint.save(step, directory)
    found = kept(step)
    step.close()
    return found


def gone_on(text, directory, steps):
    from sheaf import checkpoint
    from sheaf.parallel import build
    from sheaf.plans import Plan

    step = build(tempered(), Plan.parse(text))
    try:
        checkpoint.load(step, checkpoint.latest(directory).path)
        found = kept(step)[1]
        losses = [step().loss for _ in range(steps)]
        whole = {name: value.clone() for name, value in step.full_state().items()}
    finally:
        step.close()
    return found, losses, whole


@pytest.mark.parametrize(
    ("before", "parts", "after"),
    [
        ("dp=2,zero=1,shares=2:1", (2 / 3, 1 / 3), "dp=3,zero=2"),
        ("dp=3,zero=1", (1 / 3, 1 / 3, 1 / 3), "dp=2,zero=1,shares=1:4"),
        (
            "dp=3,zero=3,shares=3:1:2,bucket_bytes=1024",
            (1 / 2, 1 / 6, 1 / 3),
            "dp=2,zero=3,shares=balanced,bucket_bytes=1024",
        ),
        ("dp=2,shares=stolen,zero=1,shards=3:1", (3 / 4, 1 / 4), "dp=3,shares=2:1:1,zero=2,shards=1:1:2"),
    ],
)
def test_a_run_goes_on_with_other_shards_to_the_last_bit(ranks, tmp_path, before, parts, after):
    counts, wanted = ranks(saved, int(before[3]), before, tmp_path, 2)[0]
    total = 12 * 17 + 17 + 17 * 5 + 5 + 1
    for count, part in zip(counts, parts, strict=True):
        assert abs(count - total * part) <= 3, "each flat is cut to within one number"
    found, losses, whole = ranks(gone_on, int(after[3]), after, tmp_path, STEPS - 2)[0]
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    assert losses == pytest.approx(reference().losses[2:], rel=1e-12)
    for name, value in reference().weights[-1].items():
        assert torch.allclose(whole[name], value, rtol=1e-11, atol=1e-14), name


def test_other_stages_of_zero_do_not_go_on(ranks, tmp_path):
    def refused():
        from sheaf.errors import RunError

        with pytest.raises(RunError, match="resume with that plan"):
            gone_on("dp=2,zero=3,shares=2:1", tmp_path, 1)

    ranks(saved, 2, "dp=2,zero=1,shares=2:1", tmp_path, 1)
    ranks(refused, 2)


def test_shards_that_were_cut_otherwise_are_refused(ranks):
    def refused():
        from sheaf.errors import RunError
        from sheaf.parallel import build
        from sheaf.plans import Plan

        step = build(tempered(), Plan.parse("dp=2,zero=1,shares=2:1"))
        tensors, values = step.state()
        shorter = {name: value[:-1] if name == "parameter/shard 0" else value for name, value in tensors.items()}
        with pytest.raises(RunError, match=r"shard 0 has \d+ numbers in the checkpoint and \d+ here"):
            step.load(shorter, values)
        step.close()

    ranks(refused, 2)


def uneven():
    """Sums and gathers of parts of unequal size, one of them empty, and what each sent of both."""
    from sheaf.cluster.primitives import all_gather, reduce_scatter, start_all_gather, start_reduce_scatter
    from sheaf.cluster.traffic import traffic

    rank, total = torch.distributed.get_rank(), sum(SIZES)
    begun = traffic.sent_bytes
    part = torch.empty(SIZES[rank])
    start_reduce_scatter(part, torch.arange(float(total)) * 10**rank, sizes=SIZES).wait()
    between = traffic.sent_bytes
    whole = torch.empty(total)
    start_all_gather(whole, part, sizes=SIZES).wait()
    sent = between - begun, traffic.sent_bytes - between
    with pytest.raises(ValueError, match=r"rank \d of 3 has a part of"):
        start_all_gather(whole, part, sizes=[size + 1 for size in SIZES])
    with pytest.raises(ValueError, match=r"parts of 5, 0, 3 .* do not make 9"):
        start_all_gather(torch.empty(total + 1), part, sizes=SIZES)
    even, both = torch.empty(2), torch.empty(6)
    reduce_scatter(even, torch.arange(6.0))
    all_gather(both, even)
    return whole, both, sent


def test_parts_of_unequal_size_are_summed_and_gathered_in_as_many_messages(ranks):
    found = ranks(uneven, 3)
    for whole, both, _ in found:
        assert torch.equal(whole, torch.arange(8.0) * 111)
        assert torch.equal(both, torch.arange(6.0) * 3)
    links = Link(name="here", latency_seconds=0.0, bytes_per_second=1.0)
    fabric = Fabric((links,), 3, fullest=5 / 8)
    control = 144  # of gloo, for each message: one fewer to the one with nothing
    reduced, gathered = found[0][2]
    assert reduced == fabric.sent_bytes("reduce_scatter", 32) + control
    assert gathered == fabric.sent_bytes("all_gather", 32) + 2 * control
    assert fabric.seconds("all_gather", 32) == Fabric((links,), 3).seconds("all_gather", 3 * 20)
