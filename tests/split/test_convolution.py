"""Convolutions, pools and their kin on slices give plain torch's values and gradients, and move what they must."""

import pytest
import torch
from cases import Offers, check, cut, held, whole
from torch import nn
from torch.nn import functional as F

from sheaf.plans.split import Cut, Slice
from sheaf.split.mode import Splitting
from sheaf.split.moves import sliced
from sheaf.split.team import GroupTeam

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
SIZES = {2: (4, 2), 3: (4, 0, 2)}  # of 6 channels; one worker of three has none


def plane(planes, size=5):
    return (size,) * planes


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_cut_by_outputs(ranks, planes, workers):
    def run(x, weight, bias):
        return CONV[planes](x, weight, bias, 2, 1)

    x, weight, bias = (2, 4, *plane(planes)), (6, 4, *plane(planes, 3)), (6,)
    sizes = SIZES[workers]
    found = check(ranks, run, whole(*x), held(weight, 0, sizes), held(bias, 0, sizes), workers=workers)
    assert found.cuts == (Slice(1, Cut(sizes)),)
    assert [operation for operation, _ in found.moves] == ["all_reduce"]  # the gradient of the input
    found = check(ranks, run, whole(*x), held(weight, 0, sizes), whole(*bias), workers=workers)
    assert found.cuts == (Slice(1, Cut(sizes)),)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_cut_by_inputs(ranks, planes, workers):
    def run(x, weight, bias):
        return CONV[planes](x, weight, bias, dilation=2, padding="same")

    x, weight, bias = (2, 6, *plane(planes)), (4, 6, *plane(planes, 3)), (4,)
    sizes = SIZES[workers]
    found = check(ranks, run, cut(x, 1, sizes), held(weight, 1, sizes), whole(*bias), workers=workers)
    assert found.cuts == (None,)
    assert found.moves == (("all_reduce", f"partial sums of conv{planes}d"),)
    found = check(
        ranks, run, cut(x, 1, sizes), whole(*weight), held(bias, 0, (4,) + (0,) * (workers - 1)), workers=workers
    )
    assert found.cuts == (None,)
    check(ranks, run, whole(*x), held(weight, 1, sizes), whole(*bias), workers=workers)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_transposed(ranks, planes, workers):
    def run(x, weight, bias):
        return TRANSPOSED[planes](x, weight, bias, 2, 1, 1)

    sizes = SIZES[workers]
    weight = (4, 6, *plane(planes, 3))
    found = check(ranks, run, whole(2, 4, *plane(planes, 3)), held(weight, 1, sizes), whole(6), workers=workers)
    assert found.cuts == (Slice(1, Cut(sizes)),)
    weight = (6, 4, *plane(planes, 3))
    found = check(
        ranks, run, cut((2, 6, *plane(planes, 3)), 1, sizes), held(weight, 0, sizes), whole(4), workers=workers
    )
    assert found.moves == (("all_reduce", f"partial sums of conv_transpose{planes}d"),)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("per_group", [(1, 1), (1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_cut_between_groups(ranks, transposed, per_group, workers):
    """Depthwise, widening and narrowing; each worker has some whole groups."""
    ins, outs = per_group
    groups, shares = 6, SIZES[workers]
    weight = (groups * ins, outs, 3) if transposed else (groups * outs, ins, 3)
    unit = ins if transposed else outs

    def run(x, weight, bias):
        return (F.conv_transpose1d if transposed else F.conv1d)(x, weight, bias, groups=groups)

    inputs, outputs, rows = ([share * count for share in shares] for count in (ins, outs, unit))
    bias = held((groups * outs,), 0, outputs)
    for x in (cut((2, groups * ins, 7), 1, inputs), whole(2, groups * ins, 7)):
        found = check(ranks, run, x, held(weight, 0, rows), bias, workers=workers)
        assert found.cuts == (Slice(1, Cut(tuple(outputs))),)
        assert len(found.moves) == (x.dim is None)  # the gradient of a whole input is put together
    found = check(
        ranks, run, cut((2, groups * ins, 7), 1, inputs), whole(*weight), whole(groups * outs), workers=workers
    )
    assert found.cuts == (Slice(1, Cut(tuple(outputs))),)


@pytest.mark.parametrize("transposed", [False, True])
def test_cut_within_groups(ranks, transposed):
    """Each worker has a part of every group: of its inputs, or of its outputs."""
    function = F.conv_transpose2d if transposed else F.conv2d

    def run(x, weight, bias):
        return function(x, weight, bias, groups=2)

    for sizes, workers in (((2, 1), 2), ((2, 0, 1), 3)):
        weight = held((6, 4, 3, 3), 0, sizes, 2) if transposed else held((8, 3, 3, 3), 1, sizes)
        for x in (cut((2, 6, 4, 4), 1, sizes, 2), whole(2, 6, 4, 4)):
            found = check(ranks, run, x, weight, whole(8), workers=workers)
            assert found.cuts == (None,)
        found = check(ranks, run, cut((2, 6, 4, 4), 1, sizes, 2), whole(*weight.shape), whole(8), workers=workers)
        assert not found.gathered
        weight = held((4, 3, 3, 3), 1, sizes) if transposed else held((6, 2, 3, 3), 0, sizes, 2)
        found = check(ranks, run, whole(2, 4, 4, 4), weight, whole(6), workers=workers)
        assert found.cuts == (Slice(1, Cut(sizes, 2)),)


def test_cuts_that_are_no_whole_groups_are_gathered(ranks):
    def run(x, weight, bias):
        return F.conv1d(x, weight, bias, groups=2)

    found = check(ranks, run, cut((2, 6, 5), 1, (2, 4)), whole(4, 3, 3), whole(4))
    assert found.cuts == (None,)
    assert found.gathered
    found = check(ranks, run, whole(2, 6, 5), held((4, 3, 3), 0, (1, 3)), whole(4))
    assert found.cuts == (None,)


@pytest.mark.parametrize("workers", [2, 3])
def test_runs_of_channels(ranks, workers):
    """Channels that are cut in each of two runs, as after a concatenation."""
    sizes = (2, 1) if workers == 2 else (2, 1, 0)

    def run(x, weight):
        return F.conv2d(x, weight, padding=1)

    assert (
        check(ranks, run, cut((1, 6, 3, 3), 1, sizes, 2), whole(4, 6, 3, 3), workers=workers).moves[0][0]
        == "all_reduce"
    )
    found = check(ranks, run, whole(1, 4, 3, 3), held((6, 4, 3, 3), 0, sizes, 2), workers=workers)
    assert found.cuts == (Slice(1, Cut(sizes, 2)),)


@pytest.mark.parametrize("workers", [2, 3])
def test_one_sample_without_a_batch(ranks, workers):
    sizes = SIZES[workers]
    found = check(ranks, F.conv2d, whole(4, 5, 5), held((6, 4, 3, 3), 0, sizes), whole(6), workers=workers)
    assert found.cuts == (Slice(0, Cut(sizes)),)
    found = check(ranks, F.conv2d, cut((6, 5, 5), 0, sizes), held((4, 6, 3, 3), 1, sizes), whole(4), workers=workers)
    assert found.cuts == (None,)


def test_other_cuts_of_the_input(ranks):
    samples = cut((4, 3, 5, 5), 0, (3, 1))
    found = check(ranks, F.conv2d, samples, whole(4, 3, 3, 3), whole(4))
    assert found.cuts == (Slice(0, Cut((3, 1))),)
    found = check(ranks, F.conv2d, samples, held((4, 3, 3, 3), 0, (1, 3)), whole(4))
    assert found.cuts == (Slice(1, Cut((1, 3))),)
    rows = cut((2, 3, 5, 5), 2, (3, 2))
    assert check(ranks, F.conv2d, rows, whole(4, 3, 3, 3), whole(4)).cuts == (None,)
    assert check(ranks, F.conv2d, rows, held((4, 3, 3, 3), 0, (1, 3)), whole(4)).cuts == (Slice(1, Cut((1, 3))),)
    none = cut((2, 3, 5, 5), 0, (2, 0))
    assert check(ranks, F.conv2d, none, whole(4, 3, 3, 3), whole(4)).cuts == (Slice(0, Cut((2, 0))),)


def test_half_precision_under_autocast(ranks):
    """A worker without channels moves the dtype that the others move."""

    def dtypes():
        team, sizes = GroupTeam(None), Cut((4, 0, 2))
        weights = torch.ones(6, 2, 3, 3), torch.ones(4, 6, 3, 3)
        first, second = (nn.Parameter(sliced(one, dim, sizes, team.rank)) for dim, one in enumerate(weights))
        slices = {id(first): ("first", Slice(0, sizes)), id(second): ("second", Slice(1, sizes))}
        with torch.autocast("cpu", torch.bfloat16), Splitting(team, slices):
            middle = F.conv2d(torch.ones(1, 2, 5, 5), first)
            result = F.conv2d(middle, second)
        result.float().sum().backward()
        return middle.dtype, result.dtype, float(result.max().detach())

    assert ranks(dtypes, 3) == [(torch.bfloat16, torch.bfloat16, 972.0)] * 3


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(4, 6, 3), (1, 4, 5, 5), ((6, 4, 3, 3), 0, None)),
        (nn.ConvTranspose2d(4, 6, 3), (1, 4, 5, 5), ((4, 6, 3, 3), 1, None)),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), ((4, 1, 3, 3), 0, None)),
        (nn.Conv2d(6, 12, 3, groups=3), (1, 6, 5, 5), ((12, 2, 3, 3), 0, Cut((8, 4)))),
        (nn.ConvTranspose2d(6, 12, 3, groups=3), (1, 6, 5, 5), ((6, 4, 3, 3), 0, Cut((4, 2)))),
    ],
)
def test_what_is_offered_to_be_cut(layer, shape, expected):
    with Offers(tuple(layer.parameters())) as mode:
        layer(torch.ones(shape))
    assert mode.offered == [expected]


POOLS = [
    lambda x: F.max_pool2d(x, 3, 2, 1),
    lambda x: F.max_pool2d(x, 2, return_indices=True),
    lambda x: F.avg_pool2d(x, (2, 3), stride=1),
    lambda x: F.adaptive_avg_pool2d(x, (2, None)),
    lambda x: F.adaptive_max_pool2d(x, 2),
    lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True),
    lambda x: F.lp_pool2d(x.abs() + 1, 2.0, 2),
    lambda x: torch.max_pool2d(x, 2),
    lambda x: F.interpolate(x, scale_factor=2),
    lambda x: F.interpolate(x, size=(3, 7), mode="bilinear", align_corners=True),
    lambda x: F.pad(x, (1, 2, 0, 1)),
    lambda x: F.pad(x, (1, 2, 0, 1, 0, 0), value=2.0),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    lambda x: F.pad(input=x, pad=(0, -1)),
    lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    lambda x: F.pixel_unshuffle(x, 2),
    nn.Sequential(nn.ZeroPad2d(1), nn.AvgPool2d(3, 1), nn.Upsample(scale_factor=2)),
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("number", range(len(POOLS)))
def test_channels_and_samples_stay_apart(ranks, number, dim, workers):
    shape = (6, 3, 4, 6) if dim == 0 else (2, 6, 4, 6)
    found = check(ranks, POOLS[number], cut(shape, dim, SIZES[workers]), workers=workers)
    assert {place.dim for place in found.cuts} == {dim}
    assert not found.moves


@pytest.mark.parametrize("number", range(len(POOLS)))
def test_a_plane_that_is_cut_is_gathered(ranks, number):
    found = check(ranks, POOLS[number], cut((2, 4, 4, 6), 3, (3, 3)))
    assert set(found.cuts) == {None}
    assert found.gathered


def test_pools_of_other_ranks(ranks):
    for planes, function in ((1, F.max_pool1d), (3, F.max_pool3d), (1, F.avg_pool1d), (3, F.adaptive_avg_pool3d)):
        assert not check(ranks, lambda x, f=function: f(x, 2), cut((2, 4, *plane(planes, 4)), 1, (1, 3))).moves
        assert not check(ranks, lambda x, f=function: f(x, 2), cut((4, *plane(planes, 4)), 0, (4, 0))).moves


def test_padded_channels_are_gathered(ranks):
    found = check(ranks, lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), cut((2, 4, 2, 2), 1, (1, 3)))
    assert found.cuts == (None,)


@pytest.mark.parametrize("workers", [2, 3])
def test_pixels_for_channels(ranks, workers):
    sizes = (8, 4) if workers == 2 else (8, 0, 4)
    found = check(ranks, lambda x: F.pixel_shuffle(x, 2), cut((2, 12, 2, 3), 1, sizes), workers=workers)
    assert found.cuts == (Slice(1, Cut(tuple(size // 4 for size in sizes))),)
    found = check(ranks, lambda x: F.pixel_unshuffle(x, 2), cut((2, 12, 2, 4), 1, sizes), workers=workers)
    assert found.cuts == (Slice(1, Cut(tuple(size * 4 for size in sizes))),)
    uneven = check(ranks, lambda x: F.pixel_shuffle(x, 2), cut((2, 8, 2, 3), 1, (5, 3)))
    assert uneven.cuts == (None,)
