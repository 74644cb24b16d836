"""Normalisations of slices give plain torch's values and gradients, and the same running statistics everywhere."""

import copy

import pytest
import torch
from cases import Offers, check, cut, held, whole
from torch import nn
from torch.nn import functional as F

from sheaf.plans.split import Cut, Slice
from sheaf.split.mode import Splitting
from sheaf.split.moves import Part, sliced
from sheaf.split.team import GroupTeam
from sheaf.split.tensor import Split

SIZES = {2: (4, 2), 3: (4, 0, 2)}  # of 6


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_layers_along_other_dimensions(ranks, dim, workers):
    shape = (6, 3, 4) if dim == 0 else (3, 6, 4)
    sizes = SIZES[workers]

    def layer(x, weight, bias):
        return F.layer_norm(x, (4,), weight, bias, 1e-3)

    found = check(ranks, layer, cut(shape, dim, sizes), whole(4), whole(4), workers=workers)
    assert found.cuts == (Slice(dim, Cut(sizes)),)
    assert {operation for operation, _ in found.moves} == {"all_reduce"}  # the gradients of weight and bias
    assert not check(ranks, lambda x: F.layer_norm(x, [4]), cut(shape, dim, sizes), workers=workers).moves
    check(ranks, lambda x, w: F.rms_norm(x, (4,), w), cut(shape, dim, sizes), whole(4), workers=workers)
    check(ranks, layer, cut(shape, dim, sizes), held((4,), 0, (4,) + (0,) * (workers - 1)), whole(4), workers=workers)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("dim", [1, 2])
def test_layers_along_their_own_dimensions(ranks, dim, workers):
    """Two sums forward and two backward, of one number for each row; weight and bias are slices."""
    shape = (3, 6, 4) if dim == 1 else (3, 4, 6)
    rest, sizes = shape[1:], SIZES[workers]

    def layer(x, weight, bias):
        return F.layer_norm(x, rest, weight, bias)

    x = cut(shape, dim, sizes)
    parameters = [held(rest, dim - 1, sizes)] * 2
    found = check(ranks, layer, x, *parameters, workers=workers)
    assert found.cuts == (Slice(dim, Cut(sizes)),)
    assert [operation for operation, _ in found.moves] == ["all_reduce"] * 4
    check(ranks, layer, x, whole(*rest), whole(*rest), workers=workers)
    check(ranks, lambda x: F.layer_norm(x, rest, None, None, 0.1), x, workers=workers)
    found = check(ranks, lambda x, w: F.rms_norm(x, rest, w), x, parameters[0], workers=workers)
    assert [operation for operation, _ in found.moves] == ["all_reduce"] * 2
    check(ranks, lambda x: F.rms_norm(x, rest, eps=0.1), x, workers=workers)


def test_layers_cut_in_runs(ranks):
    def layer(x, weight):
        return F.layer_norm(x, (9,), weight)

    found = check(ranks, layer, cut((4, 9), 1, (2, 1), 3), held((9,), 0, (2, 1), 3))
    assert found.cuts == (Slice(1, Cut((2, 1), 3)),)
    found = check(ranks, layer, cut((4, 9), 1, (6, 3)), held((9,), 0, (2, 1), 3))
    assert found.cuts == (Slice(1, Cut((6, 3))),)


def test_far_from_zero(ranks):
    """The variance is that of what differs from the mean, not a difference of large sums."""

    def layer(x):
        return F.layer_norm(x * 1e-3 + 1e4, (6,), eps=0.0)

    def run():
        team, sizes = GroupTeam(None), Cut((4, 2))
        x = torch.linspace(-1, 1, 6, dtype=torch.float32)[None]
        with Splitting(team, {}):
            found = F.layer_norm(Split(sliced(x * 0.1 + 1e3, 1, sizes, team.rank), 1, sizes), (6,))
        return (found.local - sliced(F.layer_norm(x * 0.1 + 1e3, (6,)), 1, sizes, team.rank)).abs().max().item()

    assert max(ranks(run, 2)) < 1e-2
    check(ranks, lambda x: F.rms_norm(x * 1e3 + 1e4, (6,)), cut((2, 6), 1, (4, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(ranks, dtype, autocast):
    """Statistics are found in float32, and the result has the dtype that plain torch gives."""

    def run():
        team, sizes = GroupTeam(None), Cut((4, 0, 2))
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
        weight = torch.linspace(1, 2, 6).to(dtype)
        worst = []
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for name in ("layer_norm", "rms_norm"):
                function = getattr(F, name)
                expected = function(x, (6,), weight)
                with Splitting(team, {}):
                    found = function(Split(sliced(x, 1, sizes, team.rank), 1, sizes), (6,), weight)
                assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
                difference = (found.local - sliced(expected, 1, sizes, team.rank)).float().abs()
                worst.append(difference.max().item() if difference.numel() else 0.0)
        return max(worst)

    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.005, torch.float32: 1e-5}[dtype]
    assert max(ranks(run, 3)) < tolerance


@pytest.mark.parametrize("workers", [2, 3])
def test_groups(ranks, workers):
    sizes = SIZES[workers]

    def layer(x, weight, bias):
        return F.group_norm(x, 3, weight, bias)

    x, channels = cut((2, 6, 4, 3), 1, sizes), held((6,), 0, sizes)
    found = check(ranks, layer, x, channels, channels, workers=workers)
    assert found.cuts == (Slice(1, Cut(sizes)),)
    assert not found.moves
    found = check(ranks, layer, x, whole(6), whole(6), workers=workers)
    assert {operation for operation, _ in found.moves} == {"all_gather"}
    assert not check(ranks, lambda x: F.group_norm(x, 3), x, workers=workers).moves
    check(ranks, layer, cut((6, 6, 4), 0, sizes), whole(6), whole(6), workers=workers)


def test_cuts_through_groups_are_gathered(ranks):
    def layer(x, weight):
        return F.group_norm(x, 2, weight)

    for x in (cut((2, 6, 4), 1, (4, 2)), cut((2, 6, 4), 2, (3, 1))):
        assert check(ranks, layer, x, whole(6)).cuts == (None,)
    found = check(ranks, lambda x: F.group_norm(x, 2), cut((2, 8, 3), 1, (3, 1), 2))
    assert found.cuts == (None,)
    found = check(ranks, lambda x: F.group_norm(x, 4), cut((2, 8, 3), 1, (2, 2), 2))
    assert found.cuts == (Slice(1, Cut((2, 2), 2)),)


def test_units_that_are_asked_for():
    offers = Offers.seen(lambda x: F.group_norm(x, 2), cut((2, 12, 4), 1, (7, 5)))
    assert offers.refined == [(1, 6)]
    offers = Offers.seen(lambda x, w: F.conv1d(x, w, groups=3), cut((2, 6, 4), 1, (3, 3)), whole(9, 2, 3))
    assert offers.refined == [(1, 2)]
    offers = Offers.seen(lambda x: F.pixel_shuffle(x, 2), cut((2, 12, 4, 4), 1, (7, 5)))
    assert offers.refined == [(1, 4)]


LAYERS = {
    "batch": lambda: nn.BatchNorm2d(6, momentum=0.3),
    "batch without momentum": lambda: nn.BatchNorm2d(6, momentum=None),
    "batch with momentum 1": lambda: nn.BatchNorm2d(6, momentum=1.0),
    "batch without parameters": lambda: nn.BatchNorm2d(6, affine=False),
    "batch without statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(6, affine=True),
    "instance with statistics": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dim", [0, 1, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_with_running_statistics(ranks, kind, dim, training, workers):
    """Values, gradients and every buffer are those of the plain layer; parameters whole and as slices."""

    def run():
        torch.manual_seed(0)
        team, sizes = GroupTeam(None), Cut(SIZES[workers] if dim else (3, 2, 0)[:workers])
        layer = LAYERS[kind]().double().train(training)
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
        x = torch.randn(sizes.length if dim == 0 else 5, 6, 3, 6, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(x.shape, dtype=torch.float64)
        for holds in (False, True):
            plain, layer_split = copy.deepcopy(layer), copy.deepcopy(layer)
            slices = {}
            if holds and dim == 1:
                for name, parameter in layer_split.named_parameters():
                    parameter.data = sliced(parameter.data, 0, sizes, team.rank).clone()
                    slices[id(parameter)] = (name, Slice(0, sizes))
            inputs = [x.detach().clone().requires_grad_() for _ in range(2)]
            with Splitting(team, slices) as mode:
                for _ in range(2):
                    result = layer_split(Split(Part.apply(inputs[0], dim, sizes, team, "test"), dim, sizes))
                    expected = plain(inputs[1])
                    assert isinstance(result, Split) or dim != 1
                    together = mode.gather(result, "test") if isinstance(result, Split) else result
                    torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)
                    for one, other in zip(layer_split.buffers(), plain.buffers(), strict=True):
                        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
                    (together * weights).sum().backward()
                    (expected * weights).sum().backward()
            pairs = [(inputs[0].grad, inputs[1].grad)]
            for one, other in zip(layer_split.parameters(), plain.parameters(), strict=True):
                right = sliced(other.grad, 0, sizes, team.rank) if id(one) in slices else other.grad
                pairs.append((torch.zeros_like(one) if one.grad is None else one.grad, right))
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
        return [buffer.tolist() for buffer in layer_split.buffers()]

    found = ranks(run, workers)
    assert all(one == found[0] for one in found)  # to the last bit


@pytest.mark.parametrize("workers", [2, 3])
def test_neighbouring_channels(ranks, workers):
    sizes = SIZES[workers]
    found = check(ranks, lambda x: F.local_response_norm(x, 3), cut((2, 6, 3, 3), 1, sizes), workers=workers)
    assert found.cuts == (None,)
    for dim, shape in ((0, (6, 4, 3, 3)), (3, (2, 4, 3, 6))):
        found = check(ranks, lambda x: F.local_response_norm(x, 3), cut(shape, dim, sizes), workers=workers)
        assert not found.moves


def test_a_whole_network(ranks):
    """Columns, groups and rows in a row need one sum forward and one backward."""

    def block(x, *parameters):
        first, depthwise, last, scale, shift = parameters
        x = F.conv2d(x, first)
        x = F.relu(F.batch_norm(x, None, None, scale, shift, training=True))
        x = F.max_pool2d(F.conv2d(x, depthwise, padding=1, groups=6), 2)
        return F.conv2d(x, last)

    sizes = (4, 0, 2)
    found = check(
        ranks,
        block,
        whole(3, 2, 6, 6),
        held((6, 2, 1, 1), 0, sizes),
        held((6, 1, 3, 3), 0, sizes),
        held((3, 6, 1, 1), 1, sizes),
        held((6,), 0, sizes),
        held((6,), 0, sizes),
        workers=3,
    )
    assert [operation for operation, _ in found.moves] == ["all_reduce"] * 2
