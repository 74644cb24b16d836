"""What a worker computes, moves and sends for one microbatch, from the model's shape: layer, embedding and head.

Figures are of one worker's share under tensor, sequence and context parallelism. FLOP of products are those of whole
tiles (see ``products``). Traffic of element-wise kernels counts each array that a kernel reads or writes once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sheaf.cost.analytic.constants import Stack
from sheaf.cost.analytic.networks import networks
from sheaf.cost.analytic.products import tiled_flops
from sheaf.cost.analytic.workload import Shape, Workload

Product = tuple[float, float, float]  # rows, columns, inner

# Bytes moved per element of attention's scores where they are written: the product's output, scaled and masked softmax,
# dropout with its mask, the read by the second product; backward the same operations' gradients.
_SCORES_FORWARD, _SCORES_BACKWARD = 4.5, 6.0  # in elements
# Scale and mask of scores in kernels of their own, forward or backward, in elements; and bytes of casting scores of
# two bytes to four and back. Megatron-LM's one kernel for both and softmax takes numbers of two bytes, a microbatch's
# heads in fours and sequences up to 2048: NVIDIA/Megatron-LM megatron/model/fused_softmax.py, is_kernel_available.
_SCORES_APART, _SCORES_CAST = 4.0, 16.0
_FUSED_HEADS, _FUSED_SEQUENCE = 4, 2048
# Arrays as wide as the hidden size that norms, dropout and sums read and write in one layer's forward.
_WIDE_FORWARD, _WIDE_FUSED = 8.0, 5.0
# The same where each operation is a kernel, by Oneflow-Inc/OneFlow-Benchmark LanguageModeling/BERT/bert.py: three
# biases and four transpositions (14), twice a bias, dropout, a sum and a norm (21), less 4 that are counted as split.
_WIDE_APART = 31.0
_INSIDE_APART = 2.0  # bias of the feed-forward's inside
_BACKWARD = 1.6  # times the forward's traffic
# Bytes moved per element to round it to four bits, beside what rounding to eight takes: read for the tensor's largest,
# read and written by a Hadamard transform. NVIDIA/TransformerEngine docs, NVFP4; NVIDIA et al. 2025, arXiv:2509.25149.
_ROUNDED_TO_FOUR = 6.0
_UNFUSED = 12.0  # arrays of a feed-forward's inside: biases, clamps, scale and product, each by itself
_LOSS_BYTES = 40.0  # per logit, forward and backward: cast to fp32, largest, exponential, sum, gradient
# Kernels of a layer of experts beside a dense one's: routing, sorting, casts and products of each group, and waits for
# the counts of tokens; 9 ms beside some 2.5 ms in NVIDIA-NeMo/Megatron-Bridge's rows of one sequence a microbatch.
_EXPERT_LAUNCHES = 3.5
LORA_RANK = 16.0


@dataclass(frozen=True)
class Amounts:
    """Work of one pass over one layer (or the head): FLOP by kind, bytes moved, bytes sent."""

    product: float = 0.0  # FLOP of matrix products, tiles filled
    grouped: float = 0.0  # FLOP of the experts' products
    attention: float = 0.0  # FLOP of fused attention
    moved: float = 0.0  # bytes of element-wise kernels
    tensor_bytes: float = 0.0  # all-reduced (or scattered and gathered) among the workers that split a layer
    tensor_calls: float = 0.0
    context_bytes: float = 0.0  # keys and values passed on among the workers that split a sequence
    expert_bytes: float = 0.0  # tokens sent to experts and back, by one worker

    def __add__(self, other: "Amounts") -> "Amounts":
        return Amounts(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def times(self, factor: float) -> "Amounts":
        return Amounts(*(factor * value for value in self._values()))

    def _values(self) -> tuple[float, ...]:
        return (
            self.product,
            self.grouped,
            self.attention,
            self.moved,
            self.tensor_bytes,
            self.tensor_calls,
            self.context_bytes,
            self.expert_bytes,
        )


@dataclass(frozen=True)
class Layer:
    """One layer's passes; ``again`` is what recomputation adds to backward."""

    forward: Amounts
    backward: Amounts
    again: Amounts
    launches: float = field(default=1.0)  # times a dense layer's kernels

    @cached_property
    def both(self) -> Amounts:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Kernels:
    """How a device computes products: units at once, and the two constants of ``tiled_flops``."""

    units: int
    edge: float
    ramp: float
    aligned: int  # widths that are no multiple of this many elements leave the fast path
    misaligned: float  # times as long there
    lined: int  # widths that are no multiple of this many elements share cache lines between rows
    unlined: float  # times as long then

    def product(self, *products: Product) -> float:
        """FLOP at the large product's rate."""
        return sum(
            tiled_flops(_whole(rows), _whole(columns), _whole(inner), self.units, self.edge, self.ramp)
            * self.slowed(columns, inner)
            for rows, columns, inner in products
        )

    def slowed(self, *widths: float) -> float:
        """Times as long for such widths."""
        if any(_whole(width) % self.aligned for width in widths):
            return self.misaligned
        return self.unlined if any(_whole(width) % self.lined for width in widths) else 1.0

    def passes(self, *products: Product) -> tuple[float, float]:
        """The same for the products of a forward pass, and for their two gradients."""
        backward = 0.0
        for rows, columns, inner in products:
            slowed = self.slowed(columns, inner)
            for turned in ((rows, inner, columns), (inner, columns, rows)):
                backward += slowed * tiled_flops(*map(_whole, turned), self.units, self.edge, self.ramp)
        return self.product(*products), backward


def element_bytes(work: Workload) -> float:
    """Of an activation."""
    return 4.0 if work.precision in ("fp32", "tf32") else 2.0


def layer(work: Workload, stack: Stack, kernels: Kernels, *, expert: bool = False) -> Layer:
    """One transformer layer of this run; with ``expert`` one whose feed-forward is a mixture of experts."""
    shape, split = work.shape, work.split
    tokens = work.micro * shape.sequence / split.cp * _filled(shape, stack)
    size = element_bytes(work)
    products = [*_projections(shape, split.tp, tokens), *_feed_forward(work, tokens, expert=expert)]
    routed = _routed(work, tokens) if expert else ()
    forward, backward = kernels.passes(*products)
    local = max(1, shape.experts // split.ep)  # experts of one worker, all alike
    grouped, grouped_back = (local * each for each in kernels.passes(*routed))
    if work.adapters:  # weights are frozen: no gradient of theirs
        backward = kernels.product(*((rows, inner, columns) for rows, columns, inner in products))
        grouped_back = local * kernels.product(*((rows, inner, columns) for rows, columns, inner in routed))
    scores = _scores(shape, split.tp, tokens)
    core = 4.0 * scores * _score_width(shape)
    wide = tokens * shape.hidden * size
    arrays = _WIDE_FUSED if stack.compiled else _WIDE_APART if stack.apart else _WIDE_FORWARD
    moved = wide * arrays / (split.tp if split.sequence else 1)
    moved += tokens * size * _split_arrays(shape, stack, expert=expert) / split.tp
    if stack.flash:
        attention = Amounts(attention=core * (0.5 if shape.causal and not shape.window else 1.0))
        attention_back = attention.times(2.5)  # scores again, and four products (Dao 2023)
    else:
        core *= kernels.misaligned if shape.head_width % kernels.aligned else 1.0
        apart = _scores_apart(work, stack, size)
        attention = Amounts(attention=core, moved=scores * (_SCORES_FORWARD * size + apart))
        attention_back = Amounts(attention=2 * core, moved=scores * (_SCORES_BACKWARD * size + apart))
    sent = _sent(work, tokens, size, expert=expert)
    rounded = _rounded(work, products) + _rounded(work, routed).times(local)
    rounded_back = _rounded(work, products, back=True) + _rounded(work, routed, back=True).times(local)
    forwards = Amounts(product=forward, grouped=grouped, moved=moved) + rounded + attention + sent
    backwards = Amounts(product=backward, grouped=grouped_back, moved=_BACKWARD * moved) + rounded_back
    backwards += attention_back + sent
    again = {
        "none": Amounts(),
        "selective": attention,
        "elementwise": Amounts(moved=moved) + attention,
        "alternate": Amounts(product=forward / 2, grouped=grouped / 2, moved=moved),
        "latent": _projected(work, kernels, products, tokens * size),
        "full": forwards,
    }[_recompute(work, stack)]
    return Layer(forwards, backwards, again, _EXPERT_LAUNCHES if expert else 1.0)


def network(work: Workload, winograd: float) -> Layer:
    """A convolutional network as one layer: its products are taken as full tiles.

    Convolutions of 3 x 3 take ``winograd`` times fewer multiplications (1: as many as there are).
    """
    known = networks()[work.shape.network]
    size = element_bytes(work)
    touched = known.activations * work.micro * size
    product = known.flops * work.micro * (1 - known.threes * (1 - 1 / winograd))
    forward = Amounts(product=product, moved=6.0 * touched)  # out, norm twice, activation twice, in
    backward = Amounts(product=2 * product, moved=10.0 * touched)
    return Layer(forward, backward, Amounts(), launches=known.kernels / 40)


def head(work: Workload, stack: Stack, kernels: Kernels) -> tuple[Amounts, Amounts]:
    """Projection to the vocabulary and loss: forward and backward."""
    shape, split = work.shape, work.split
    tokens = work.micro * shape.sequence / split.cp
    columns = padded_vocabulary(work, stack) / split.tp
    if shape.family == "bert":
        tokens *= stack.masked * _filled(shape, stack)
    forward, backward = kernels.passes((tokens, columns, shape.hidden))
    if work.adapters:
        backward = kernels.product((tokens, shape.hidden, columns))
    lost = tokens * columns * _LOSS_BYTES
    sent = Amounts(tensor_bytes=tokens * shape.hidden * 2.0, tensor_calls=1.0) if split.tp > 1 else Amounts()
    embedded = 8.0 * tokens * shape.hidden
    return (
        Amounts(product=forward, moved=lost / 2 + embedded) + sent.times(0.5),
        Amounts(product=backward, moved=lost / 2 + embedded) + sent.times(0.5),
    )


def _filled(shape: Shape, stack: Stack) -> float:
    """Share of tokens that are computed: long sequences of a masked model hold padding that some stacks leave out."""
    return stack.filled if shape.family == "bert" and shape.sequence > 128 else 1.0


def padded_vocabulary(work: Workload, stack: Stack) -> float:
    """The vocabulary, filled up as the stack does so that it splits evenly."""
    unit = (stack.padded if work.split.tp > 1 else stack.padded_whole or stack.padded) * work.split.tp
    return math.ceil(work.shape.vocabulary / unit) * unit


def layer_parameters(shape: Shape, *, expert: bool = False) -> tuple[float, float]:
    """Weights of one layer: those of every worker's own, and those of the experts."""
    hidden, width = shape.hidden, shape.head_width
    own = hidden * width * (2 * shape.heads + 2 * shape.kv_heads)
    if shape.latent:
        ranks, positions = _latent(shape)
        own = hidden * (ranks[0] + ranks[1] + positions) + ranks[0] * shape.heads * (width + positions)
        own += ranks[1] * shape.heads * 2 * width + shape.heads * width * hidden
    matrices = 3 if shape.gated else 2
    if not expert:
        return own + matrices * hidden * shape.ffn + 13 * hidden, 0.0
    return own + hidden * shape.experts + 4 * hidden, matrices * hidden * shape.expert_ffn * shape.experts


def _latent(shape: Shape) -> tuple[tuple[float, float], float]:
    """Ranks of queries and of keys and values, and what positions add: DeepSeek-AI 2024, of which all are."""
    del shape
    return (1536.0, 512.0), 64.0


def _projections(shape: Shape, tp: int, tokens: float) -> list[Product]:
    hidden, width, heads = shape.hidden, shape.head_width, shape.heads / tp
    if shape.latent:
        (queries, values), positions = _latent(shape)
        return [
            (tokens, queries + values + positions, hidden),
            (tokens, heads * (width + positions), queries),
            (tokens, heads * 2 * width, values),
            (tokens, hidden, heads * width),
        ]
    kv_heads = max(1.0, shape.kv_heads / tp)
    return [(tokens, (heads + 2 * kv_heads) * width, hidden), (tokens, hidden, heads * width)]


def _feed_forward(work: Workload, tokens: float, *, expert: bool) -> list[Product]:
    shape, tp = work.shape, work.split.tp
    parts = 2 if shape.gated else 1
    if not expert:
        return [(tokens, parts * shape.ffn / tp, shape.hidden), (tokens, shape.hidden, shape.ffn / tp)]
    router = (tokens, shape.experts, shape.hidden)
    if not shape.latent:
        return [router]
    width = shape.expert_ffn / tp  # one shared expert beside the routed ones (DeepSeek-AI 2024)
    return [router, (tokens, parts * width, shape.hidden), (tokens, shape.hidden, width)]


def _routed(work: Workload, tokens: float) -> list[Product]:
    """Products of one of a worker's experts: the tokens of all for them are its own times the experts of each."""
    shape = work.shape
    local = max(1, shape.experts // work.split.ep)
    rows = tokens * shape.experts_per_token / local
    width = shape.expert_ffn / work.split.tp
    parts = 2 if shape.gated else 1
    return [(rows, parts * width, shape.hidden), (rows, shape.hidden, width)]


def _rounded(work: Workload, products: Sequence[Product], *, back: bool = False) -> Amounts:
    """Rounding to four bits of what enters products; going back, of the gradients that come to them."""
    if work.precision != "fp4":
        return Amounts()
    elements = sum(rows * (columns if back else inner) for rows, columns, inner in products)
    return Amounts(moved=_ROUNDED_TO_FOUR * elements)


def _split_arrays(shape: Shape, stack: Stack, *, expert: bool) -> float:
    """Elements per token of arrays that are cut like the weights: queries to values, and the feed-forward's inside."""
    inside = shape.expert_ffn * shape.experts_per_token if expert else shape.ffn
    arrays = (3.0 if shape.gated else 2.0) + (0.0 if stack.compiled else 1.0 if shape.gated else 0.0)
    arrays += _INSIDE_APART if stack.apart else 0.0
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_width
    arrays += _UNFUSED if expert and shape.biased else 0.0
    tokens_moved = 6.0 * shape.hidden * shape.experts_per_token if expert else 0.0  # sorted by expert, and back
    return arrays * inside + attention + tokens_moved


def _scores(shape: Shape, tp: int, tokens: float) -> float:
    """Scores of one worker's heads and tokens."""
    reach = shape.sequence
    if shape.window:
        reach = (shape.sequence / 2 + min(shape.window, shape.sequence)) / 2
    return tokens * reach * shape.heads / tp


def _projected(work: Workload, kernels: Kernels, products: list[Product], token_bytes: float) -> Amounts:
    """Queries, keys and values made again from their low ranks."""
    shape = work.shape
    if not shape.latent:
        return Amounts()
    arrays = 3.0 * shape.heads * shape.head_width / work.split.tp
    return Amounts(product=kernels.product(*products[1:3]), moved=token_bytes * arrays)


def _scores_apart(work: Workload, stack: Stack, size: float) -> float:
    """Bytes moved per score, in one pass, by what one kernel does elsewhere."""
    if stack.apart:
        return _SCORES_APART * size
    heads = work.micro * work.shape.heads / work.split.tp
    fused = size == 2.0 and heads % _FUSED_HEADS == 0 and work.shape.sequence <= _FUSED_SEQUENCE
    if not stack.fused_in_halves or fused:
        return 0.0
    return _SCORES_APART * 4.0 + (_SCORES_CAST if size == 2.0 else 0.0)


def _score_width(shape: Shape) -> float:
    return shape.head_width + (32.0 if shape.latent else 0.0)


def _sent(work: Workload, tokens: float, size: float, *, expert: bool) -> Amounts:
    shape, split = work.shape, work.split
    whole = tokens * shape.hidden * size
    tensor = 2.0 if split.tp > 1 else 0.0
    keys = 2 * tokens * max(1.0, shape.kv_heads / split.tp) * shape.head_width * size
    routed = 2 * whole * shape.experts_per_token / (split.tp if split.sequence else 1)
    return Amounts(
        tensor_bytes=tensor * whole,
        tensor_calls=tensor,
        context_bytes=keys * (split.cp - 1) if split.cp > 1 else 0.0,
        expert_bytes=routed * (split.ep - 1) / split.ep if expert and split.ep > 1 else 0.0,
    )


def _recompute(work: Workload, stack: Stack) -> str:
    return stack.recompute if work.split.recompute == "none" and stack.recompute != "none" else work.split.recompute


def _whole(value: float) -> int:
    return max(1, math.ceil(value))
