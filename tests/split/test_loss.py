"""Losses of split tensors, and what is normalised along a cut dimension, against plain torch."""

import pytest
import torch
from cases import check, check_threads, cut, whole
from torch.nn import functional as F

UNEVEN = (13, 13, 12, 12)  # a vocabulary of 50


def targets(*shape: int, classes: int = 50, ignored: bool = False) -> torch.Tensor:
    made = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(5))
    if ignored:
        made.view(-1)[1::3] = -100
    return made


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_logits_cut_by_class(reduction: str, smoothing: float, weighted: bool) -> None:
    weight = torch.linspace(0.5, 2.0, 50, dtype=torch.float64) if weighted else None

    def lost(logits: torch.Tensor) -> torch.Tensor:
        target = targets(7, ignored=True)
        return F.cross_entropy(logits * 3, target, weight, reduction=reduction, label_smoothing=smoothing)

    found = check_threads(lost, cut((7, 50), 1, UNEVEN), workers=4)
    assert found.moves == (("all_gather", "whole for cross_entropy"),)


def test_cross_entropy_on_real_ranks(ranks) -> None:
    found = check(
        ranks,
        lambda logits: F.cross_entropy(logits, targets(7, ignored=True), label_smoothing=0.1),
        cut((7, 50), 1, UNEVEN),
        workers=4,
    )
    assert found.moves == (("all_gather", "whole for cross_entropy"),)


@pytest.mark.parametrize("sizes", [(4, 0, 3), (0, 7, 0), (2, 3, 2)])
@pytest.mark.parametrize(("shape", "place"), [((2, 7, 3, 4), 1), ((2, 7, 5), 1), ((7,), 0)])
def test_cross_entropy_of_images_sequences_and_single_samples(
    sizes: tuple[int, ...], shape: tuple[int, ...], place: int
) -> None:
    rows = [size for dim, size in enumerate(shape) if dim != place]
    target = targets(*rows, classes=7, ignored=len(rows) > 1)
    for smoothing in (0.0, 0.2):
        check_threads(
            lambda logits, smoothing=smoothing: F.cross_entropy(logits, target, label_smoothing=smoothing),
            cut(shape, place, sizes),
            workers=3,
        )


def test_cross_entropy_of_classes_in_runs() -> None:
    check_threads(lambda logits: F.cross_entropy(logits, targets(6, classes=12)), cut((6, 12), 1, (1, 3), outer=3))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("place", [0, 1])
def test_a_batch_of_ignored_targets_gives_nan_and_no_gradient(smoothing: float, place: int) -> None:
    def lost(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, torch.full((4,), -100), label_smoothing=smoothing)

    check_threads(lost, cut((4, 6), place, (3, 1) if place == 0 else (5, 1)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("cut_targets", [False, True])
def test_cross_entropy_of_likely_classes(reduction: str, cut_targets: bool) -> None:
    weight = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)

    def lost(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=0.1)

    likely = cut((4, 5, 2), 1, (2, 2, 1)) if cut_targets else whole(4, 5, 2)
    check_threads(lost, cut((4, 5, 2), 1, (2, 2, 1)), likely, workers=3)
    check_threads(lost, cut((4, 5, 2), 0, (2, 0, 2)), likely, workers=3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("place", [0, 2])
def test_cross_entropy_of_some_of_the_rows(reduction: str, place: int) -> None:
    weight = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)

    def lost(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets(4, 4, classes=5, ignored=True), weight, reduction=reduction)

    found = check_threads(lost, cut((4, 5, 4), place, (3, 0, 1)), workers=3)
    assert not found.gathered


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("place", "sizes"), [(0, (3, 1)), (1, (5, 2)), (1, (0, 7))])
def test_negative_log_likelihood(reduction: str, place: int, sizes: tuple[int, ...]) -> None:
    weight = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)

    def lost(logits: torch.Tensor) -> torch.Tensor:
        return F.nll_loss(F.log_softmax(logits, 1), targets(4, classes=7, ignored=True), weight, reduction=reduction)

    assert "whole for nll_loss" not in [why for _, why in check_threads(lost, cut((4, 7), place, sizes)).moves]


def test_a_target_that_is_no_class_is_told() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        check_threads(_without_plain, cut((2, 6), 1, (3, 3)))


def _without_plain(logits: torch.Tensor) -> torch.Tensor:
    if type(logits) is torch.Tensor:
        return logits.sum()
    return F.cross_entropy(logits, torch.tensor([1, 6]))


@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("sizes", [(4, 2), (6, 0)])
def test_softmax_and_its_logarithm_along_the_cut_dimension(place: int, sizes: tuple[int, ...]) -> None:
    def run(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            F.softmax(tensor, place),
            F.log_softmax(tensor, dim=place),
            tensor.softmax(dim=place),
            torch.log_softmax(tensor, place, torch.float64),
            torch.logsumexp(tensor, place),
            tensor.logsumexp(place, keepdim=True),
        )

    found = check_threads(run, cut((6, 6, 6), place % 3, sizes))
    assert [one is not None for one in found.cuts] == [True] * 4 + [False] * 2


def test_softmax_on_real_ranks(ranks) -> None:
    check(ranks, lambda tensor: F.softmax(tensor * 5, -1), cut((3, 7), 1, (3, 2, 2)), workers=3)


def test_softmax_with_masked_elements() -> None:
    hidden = torch.tensor([True, True, True, False, True, False])

    def run(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.masked_fill(hidden, -torch.inf).softmax(-1)

    check_threads(run, cut((3, 6), 1, (3, 3)))


def test_softmax_keeps_to_the_other_dimensions() -> None:
    assert check_threads(lambda tensor: tensor.softmax(0), cut((3, 6), 1, (3, 3))).moves == ()


def test_half_precision_is_computed_in_float32() -> None:
    def run(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half, target = tensor.to(torch.bfloat16), targets(4, classes=40)
        exact = half.double()
        found = F.softmax(half, -1), F.log_softmax(half, -1), F.cross_entropy(half, target)
        right = F.softmax(exact, -1), F.log_softmax(exact, -1), F.cross_entropy(exact, target)
        assert all(one.dtype == torch.bfloat16 for one in found)
        return tuple(((a - b).abs() <= b.abs() / 128).all() for a, b in zip(found, right, strict=True))

    check_threads(run, cut((4, 40), 1, (30, 10)))


@pytest.mark.parametrize(("sizes", "outer"), [((4, 2), 1), ((0, 6), 1), ((1, 2), 2), ((6, 0), 1)])
def test_the_place_of_the_largest(sizes: tuple[int, ...], outer: int) -> None:
    def run(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        coarse = (tensor * 1.5).round()
        odd = coarse.clone().masked_fill(torch.arange(6) == 4, torch.nan)
        return (
            coarse.argmax(-1),
            torch.argmax(coarse, 1, keepdim=True),
            coarse.argmin(1),
            odd.argmax(1),
            odd.argmin(1),
            coarse.long().argmax(1),
            torch.full_like(coarse, -torch.inf).argmax(1),
        )

    found = check_threads(run, cut((40, 6), 1, sizes, outer))
    assert "whole for clone" not in [why for _, why in found.moves]


LOSSES = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth": lambda *args, **named: F.smooth_l1_loss(*args, beta=0.5, **named),
    "huber": lambda *args, **named: F.huber_loss(*args, delta=0.5, **named),
    "logits": F.binary_cross_entropy_with_logits,
    "margin": lambda one, other, **named: F.soft_margin_loss(one, other.detach().sign(), **named),
    "poisson": lambda one, other, **named: F.poisson_nll_loss(one, other.abs(), full=False, **named),
    "hinge": lambda one, other, **named: F.hinge_embedding_loss(one, other.detach().sign(), **named),
    "likely": lambda one, other, **named: F.binary_cross_entropy(one.sigmoid(), other.sigmoid(), **named),
    "gaussian": lambda one, other, **named: F.gaussian_nll_loss(one, other, other.square() + 0.1, **named),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_of_elements(loss: str, reduction: str) -> None:
    given = cut((4, 5), 1, (3, 0, 2))
    for other in (given, whole(4, 5), cut((4, 5), 1, (2, 2, 1))):
        check_threads(lambda *both: LOSSES[loss](*both, reduction=reduction), given, other, workers=3)
    check_threads(lambda *both: LOSSES[loss](*both, reduction=reduction), whole(4, 5), given, workers=3)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("place", [0, 1])
def test_divergence(reduction: str, place: int) -> None:
    def run(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return F.kl_div(one.log_softmax(1), other.softmax(1), reduction=reduction)

    check_threads(run, cut((4, 4), place, (3, 1)), whole(4, 4))


def test_weighted_losses() -> None:
    sure = torch.linspace(0.1, 1.0, 20, dtype=torch.float64).view(4, 5)

    def run(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            F.mse_loss(one, other, weight=sure),
            F.huber_loss(one, other, weight=sure),
            F.binary_cross_entropy_with_logits(one, other, weight=sure[0], pos_weight=sure[1]),
            F.gaussian_nll_loss(one, other, sure[:, 0], full=True),
            F.gaussian_nll_loss(one, other, sure[:, :1]),
            F.gaussian_nll_loss(one, other, 0.5),
        )

    check_threads(run, cut((4, 5), 1, (3, 2)), whole(4, 5))
    check_threads(run, cut((4, 5), 0, (3, 1)), whole(4, 5))
