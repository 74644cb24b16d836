"""Whatever a model does to shapes, elements, sums and products of slices, values and gradients are plain torch's."""

import math
from typing import NamedTuple

import pytest
import torch
from cases import Given, check, check_threads, cut, held, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sheaf.plans.split import Cut, Slice

COUNT = settings(deadline=None, max_examples=25, derandomize=True)
workers_of = st.shared(st.integers(2, 3), key="workers")


class Runs(NamedTuple):
    """As a Cut, without its checks: those draw random numbers, which Hypothesis does not want within strategies."""

    sizes: tuple[int, ...]
    outer: int

    @property
    def length(self):
        return self.outer * sum(self.sizes)


@st.composite
def cuts(draw, workers):
    """A cut of some dimension; a worker may have nothing."""
    outer = draw(st.sampled_from([1, 1, 1, 2, 3]))
    sizes = draw(st.lists(st.integers(0, 3), min_size=workers, max_size=workers).filter(any))
    unit = draw(st.sampled_from([1, 1, 2]))
    return Runs(tuple(size * unit for size in sizes), outer)


@st.composite
def slices(draw, workers, ndim=None, kind="normal"):
    """A tensor of one to four dimensions, one of which is cut."""
    ndim = ndim or draw(st.integers(1, 4))
    place, chosen = draw(st.integers(0, ndim - 1)), draw(cuts(workers))
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    shape[place] = chosen.length
    return cut(shape, place, chosen.sizes, chosen.outer, kind)


@st.composite
def factors(draw, size):
    """Numbers whose product is ``size``."""
    found = []
    while size > 1 and len(found) < 3 and draw(st.booleans()):
        divisor = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        found.append(divisor)
        size //= divisor
    return [*found, size]


@st.composite
def dims(draw, ndim):
    return draw(st.integers(-ndim, ndim - 1))


@st.composite
def reshaped(draw, shape):
    """Neighbouring dimensions merged, and what comes out split again."""
    made, at = [], 0
    while at < len(shape):
        take = draw(st.integers(1, len(shape) - at))
        made += draw(factors(math.prod(shape[at : at + take])))
        at += take
    if draw(st.booleans()):
        made[draw(st.integers(0, len(made) - 1))] = -1
    return made


@st.composite
def keys(draw, shape):
    """An index: numbers, slices, None, an ellipsis, and a list or mask in one place."""
    found, dim, rich = [], 0, draw(st.booleans())
    while dim < len(shape) and draw(st.integers(0, 5)):
        size = shape[dim]
        kind = draw(st.sampled_from(["all", "all", "number", "slice", "none", "list", "mask", "ellipsis"]))
        if kind == "none":
            found.append(None)
            continue
        if kind == "ellipsis":
            if Ellipsis not in [key for key in found if not isinstance(key, torch.Tensor)]:
                rest = draw(st.integers(dim, len(shape)))
                found.append(Ellipsis)
                if rest == len(shape):
                    break
                # what follows names the last dimensions
                tail = [draw(st.sampled_from([slice(None), 0, slice(0, 1)])) for _ in range(len(shape) - rest)]
                return tuple(found + tail)
            continue
        if kind in ("list", "mask") and not rich:
            kind = "slice"
        if kind == "number":
            found.append(draw(st.integers(-size, size - 1)))
        elif kind == "slice":
            start = draw(st.integers(0, size - 1))
            found.append(slice(start, draw(st.integers(start + 1, size)), draw(st.sampled_from([None, 1, 2]))))
        elif kind == "list":
            found.append(torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3))))
            rich = False
        elif kind == "mask":
            found.append(torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))))
            rich = False
        else:
            found.append(slice(None))
        dim += 1
    return tuple(found) if draw(st.booleans()) or len(found) != 1 else found[0]


@COUNT
@given(st.data())
def test_reshaping(data):
    workers = data.draw(workers_of)
    x = data.draw(slices(workers))
    shape = data.draw(reshaped(x.shape))
    check_threads(lambda x: x.reshape(shape) * 2, x, workers=workers)
    start = data.draw(st.integers(0, len(x.shape) - 1))
    end = data.draw(st.integers(start, len(x.shape) - 1))
    check_threads(lambda x: x.flatten(start, end), x, workers=workers)
    sizes = data.draw(factors(x.shape[start]))
    check_threads(lambda x: x.unflatten(start, sizes), x, workers=workers)
    check_threads(
        lambda x, y: (x.view(*shape), x.view_as(y)), x, whole(*torch.empty(x.shape).view(shape).shape), workers=workers
    )


@COUNT
@given(st.data())
def test_reordering(data):
    workers = data.draw(workers_of)
    x = data.draw(slices(workers))
    ndim = len(x.shape)
    order = data.draw(st.permutations(range(ndim)))
    one, other = data.draw(dims(ndim)), data.draw(dims(ndim))
    new = data.draw(dims(ndim + 1))
    for function in (
        lambda x: x.permute(order),
        lambda x: torch.permute(x, order).reshape(-1),
        lambda x: x.transpose(one, other),
        lambda x: torch.movedim(x, one, other),
        lambda x: x.unsqueeze(new),
        lambda x: x.unsqueeze(new).squeeze(new),
        lambda x: x.squeeze(),
        lambda x: x.squeeze(one),
        lambda x: x.mT if ndim > 1 else x,
        lambda x: x.T if ndim == 2 else x,
        lambda x: x.flip(one),
        lambda x: x.flip(*sorted({one % ndim, other % ndim})),
        lambda x: torch.roll(x, 1, one),
        lambda x: x.roll((1, 2), (one, other)),
        lambda x: x.cumsum(one),
        lambda x: x.tril() if ndim > 1 else x,
    ):
        check_threads(function, x, workers=workers)


@COUNT
@given(st.data())
def test_pieces(data):
    workers = data.draw(workers_of)
    x = data.draw(slices(workers))
    dim = data.draw(dims(len(x.shape)))
    size = x.shape[dim]
    count, start = data.draw(st.integers(1, 4)), data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - start))
    sizes = data.draw(st.sampled_from([[size], [start, size - start], [0, size]]))
    picked = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)))
    for function in (
        lambda x: x.chunk(count, dim),
        lambda x: torch.chunk(x, chunks=count, dim=dim),
        lambda x: x.split(count, dim),
        lambda x: x.split(sizes, dim=dim),
        lambda x: torch.tensor_split(x, count, dim),
        lambda x: torch.tensor_split(x, [start, start + length], dim=dim),
        lambda x: x.unbind(dim),
        list,
        lambda x: x.narrow(dim, start, length),
        lambda x: x.select(dim, start),
        lambda x: x.index_select(dim, picked),
    ):
        check_threads(function, x, workers=workers)


@settings(COUNT, max_examples=60)
@given(st.data())
def test_indexing(data):
    workers = data.draw(workers_of)
    x = data.draw(slices(workers))
    index = data.draw(keys(x.shape))
    check_threads(lambda x: x[index], x, workers=workers)


@COUNT
@given(st.data())
def test_joining(data):
    workers = data.draw(workers_of)
    x = data.draw(slices(workers))
    dim, new = data.draw(dims(len(x.shape))), data.draw(dims(len(x.shape) + 1))
    longer = list(x.shape)
    longer[dim] += 1
    place = data.draw(st.sampled_from([x, Given(x.shape), held(x.shape, x.dim, x.sizes, x.outer)]))
    for other in (x, place):
        check_threads(lambda x, y: torch.cat([y, x, x], dim), x, other, workers=workers)
        check_threads(lambda x, y: torch.stack((x, y), new), x, other, workers=workers)
    check_threads(lambda x, y: torch.cat((x, y), dim=dim), x, whole(*longer), workers=workers)
    times = data.draw(st.lists(st.integers(1, 3), min_size=len(x.shape), max_size=len(x.shape) + 1))
    check_threads(lambda x: x.repeat(*times), x, workers=workers)
    check_threads(lambda x: torch.tile(x, tuple(times)), x, workers=workers)
    check_threads(lambda x: x.repeat_interleave(2, dim), x, workers=workers)
    check_threads(lambda x: x.expand(3, *x.shape), x, workers=workers)
    check_threads(lambda x: x.expand(2, *[-1] * x.ndim), x, workers=workers)


@st.composite
def beside(draw, x, workers):
    """A tensor that broadcasts against ``x``: whole, cut alike, or cut in another way; or one of more dimensions."""
    dropped = draw(st.integers(0, len(x.shape)))
    shape = [size if draw(st.booleans()) else 1 for size in x.shape[dropped:]]
    kind = draw(st.sampled_from(["whole", "alike", "other", "longer"]))
    if kind == "alike":
        return x
    if kind == "longer":
        return whole(2, *[size if size > 1 else 3 for size in x.shape])
    if kind == "whole" or not shape:
        return whole(*shape)
    place = draw(st.integers(0, len(shape) - 1))
    sizes = draw(st.permutations([shape[place], *[0] * (workers - 1)]))
    return cut(shape, place, sizes)


@settings(COUNT, max_examples=40)
@given(st.data())
def test_elements(data):
    workers = data.draw(workers_of)
    x = data.draw(slices(workers))
    y = data.draw(beside(x, workers))
    mask = Given(y.shape, y.dim, y.sizes, y.outer, kind="mask")
    for function in (
        lambda x, y, m: x * y + y,
        lambda x, y, m: 2.0 - torch.where(m, y, x),
        lambda x, y, m: torch.lerp(y, x, 0.3),
        lambda x, y, m: torch.addcmul(x, y, x, value=2.0),
        lambda x, y, m: torch.maximum(y, x) > 0,
        lambda x, y, m: F.gelu(x).masked_fill(m, 2.0) if len(m.shape) <= len(x.shape) else x,
        lambda x, y, m: x.clone().mul_(y) if torch.broadcast_shapes(x.shape, y.shape) == x.shape else x,
        lambda x, y, m: F.relu(x * 1, inplace=True).to(torch.float64),
        lambda x, y, m: (*torch.where(x > 0), x == None, x.prelu(x.flatten()[:1])),  # noqa: E711
        lambda x, y, m: (torch.zeros_like(x) + y.type_as(x)).detach() + x,
    ):
        check_threads(function, x, y, mask, workers=workers)


@COUNT
@given(st.data())
def test_sums_and_orders(data):
    workers = data.draw(workers_of)
    x = data.draw(slices(workers))
    ndim = len(x.shape)
    dim, keep = data.draw(dims(ndim)), data.draw(st.booleans())
    several = sorted(data.draw(st.sets(st.integers(0, ndim - 1), min_size=1)))
    for function in (
        lambda x: x.sum(),
        lambda x: x.mean(dim, keepdim=keep),
        lambda x: x.sum(several, keep),
        lambda x: x * x.mean(several, keepdim=True),
        lambda x: torch.nansum(x, dim),
        lambda x: x.amax(dim, keepdim=keep),
        lambda x: x.max(dim, keep),
        lambda x: x.max(),
        lambda x: x.argmax(dim, keepdim=keep),
        lambda x: x.var(several, correction=0, keepdim=keep),
        lambda x: torch.var_mean(x, dim, correction=0),
        lambda x: x.logsumexp(several, keepdim=keep),
        lambda x: (x > 0).any(dim),
        lambda x: (x > 0).all(),
        lambda x: x.norm(2, dim),
        lambda x: x.sort(dim, descending=True),
        lambda x: x.topk(1, dim),
        lambda x: x.softmax(dim),
        lambda x: F.log_softmax(x, dim=dim),
        lambda x: F.normalize(x, dim=dim),
        lambda x: x.var(correction=0),
        lambda x: (x.shape, x.numel(), len(x), x.size(dim), x.dim(), x.stride() is None),
    ):
        check_threads(function, x, workers=workers)


@st.composite
def operands(draw, letters, sizes, cut_letter, chosen):
    """A tensor with these dimensions, cut by a letter where it has it (and is drawn so)."""
    shape = [sizes[letter] for letter in letters]
    if cut_letter in letters and draw(st.booleans()):
        make = held if draw(st.booleans()) else cut
        return make(shape, letters.index(cut_letter), chosen.sizes, chosen.outer)
    return whole(*shape)


@settings(COUNT, max_examples=40)
@given(st.data())
def test_products(data):
    workers = data.draw(workers_of)
    equation = data.draw(
        st.sampled_from(
            [
                "xy,yz->xz",
                "bxy,yz->bxz",
                "bxy,byz->bxz",
                "abxy,byz->abxz",
                "y,yz->z",
                "xy,y->x",
                "y,y->",
                "abxy,abzy->abxz",
            ]
        )
    )
    letters, _ = equation.split("->")
    left, right = letters.split(",")
    names = sorted(set(left + right))
    sizes = {name: data.draw(st.integers(1, 3)) for name in names}
    first, second = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    chosen = data.draw(cuts(workers))
    sizes[first] = sizes[second] = chosen.length
    x = data.draw(operands(left, sizes, first, chosen))
    y = data.draw(operands(right, sizes, second, chosen))
    check_threads(lambda x, y: torch.einsum(equation, x, y), x, y, workers=workers)
    if "zy" not in right:
        check_threads(lambda x, y: x @ y, x, y, workers=workers)
        check_threads(torch.matmul, x, y, workers=workers)
    else:
        check_threads(lambda x, y: x @ y.transpose(-1, -2), x, y, workers=workers)
    if equation == "xy,yz->xz":
        added = whole(sizes["z"])
        check_threads(lambda x, y, b: torch.addmm(b, x, y), x, y, added, workers=workers)
        check_threads(lambda x, y, b: F.linear(x, y.t(), b), x, y, added, workers=workers)
    if equation == "bxy,byz->bxz":
        check_threads(torch.bmm, x, y, workers=workers)
        check_threads(lambda x, y: torch.baddbmm(x @ y, x, y), x, y, workers=workers)


@COUNT
@given(st.data())
def test_linear_and_embedding(data):
    workers = data.draw(workers_of)
    features, outputs = data.draw(cuts(workers)), data.draw(cuts(workers))
    rows = [data.draw(st.integers(1, 3)) for _ in range(data.draw(st.integers(0, 2)))]
    shape, matrix = (*rows, features.length), (outputs.length, features.length)
    x = data.draw(st.sampled_from([whole(*shape), cut(shape, len(rows), features.sizes, features.outer)]))
    weight = data.draw(
        st.sampled_from(
            [
                whole(*matrix),
                held(matrix, 0, outputs.sizes, outputs.outer),
                held(matrix, 1, features.sizes, features.outer),
            ]
        )
    )
    bias = data.draw(st.sampled_from([whole(outputs.length), held((outputs.length,), 0, outputs.sizes, outputs.outer)]))
    check_threads(F.linear, x, weight, bias, workers=workers)
    table = (5, features.length)
    by_rows = held(table, 0, [5 - workers + 1, *[1] * (workers - 1)])
    for weight in (
        whole(*table),
        held(table, 1, features.sizes, features.outer),
        by_rows,
        held(table, 0, [0, 5, 0][:workers]),
    ):
        numbers = data.draw(slices(workers, ndim=2, kind="long"))
        for number in (numbers, whole(*numbers.shape, kind="long")):
            check_threads(lambda i, w: F.embedding(i, w, padding_idx=1), number, weight, workers=workers)


def test_heads_follow_through_views():
    """Queries, keys and values in one product, cut between heads: nothing is gathered."""

    def attention(x, weight, out):
        q, k, v = F.linear(x, weight).view(2, 5, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return F.linear(mixed.transpose(1, 2).reshape(2, 5, 8), out)

    def chunked(x, weight, out):
        q, k, v = (one.view(2, 5, 4, 2).transpose(1, 2) for one in F.linear(x, weight).chunk(3, -1))
        mixed = (q @ k.mT).softmax(-1) @ v
        return F.linear(mixed.transpose(1, 2).flatten(2), out)

    for function in (attention, chunked):
        for sizes in ((6, 2), (4, 4), (8, 0)):
            weight, out = held((24, 8), 0, sizes, 3), held((8, 8), 1, sizes)
            found = check_threads(function, whole(2, 5, 8), weight, out)
            assert [operation for operation, _ in found.moves] == ["all_reduce"] * 2


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_on_real_ranks(ranks, workers):
    sizes = (4, 2) if workers == 2 else (4, 0, 2)

    def run(x, weight, out):
        y = F.linear(x, weight).view(2, 3, 3, 2).transpose(1, 2)
        y = (y - y.mean((1, 2, 3), keepdim=True)).softmax(-1).transpose(1, 2).flatten(2)
        return F.linear(y, out), y.sum(0)

    found = check(ranks, run, whole(2, 3, 4), held((6, 4), 0, sizes), held((3, 6), 1, sizes), workers=workers)
    assert found.cuts == (None, Slice(1, Cut(sizes)))


def test_slopes_and_gates():
    for slopes in (held((6,), 0, (2, 0, 4)), whole(6), whole(1)):
        found = check_threads(F.prelu, cut((2, 6, 3), 1, (2, 0, 4)), slopes, workers=3)
        assert found.cuts == (Slice(1, Cut((2, 0, 4))),)
        check_threads(F.prelu, cut((3, 6, 3), 0, (2, 0, 1)), slopes, workers=3)
    assert check_threads(F.glu, cut((3, 6), 1, (2, 1), 2)).cuts == (Slice(1, Cut((2, 1))),)
    assert check_threads(lambda x: F.glu(x, 0), cut((4, 6), 1, (5, 1))).cuts == (Slice(1, Cut((5, 1))),)
    assert check_threads(F.glu, cut((3, 6), 1, (5, 1))).cuts == (None,)


def test_a_whole_that_was_gathered_without_gradient():
    def run(x):
        with torch.no_grad():
            scale = torch.linalg.vector_norm(x)
        return torch.linalg.vector_norm(x) / scale

    check_threads(run, cut((4, 6), 1, (5, 1)))
