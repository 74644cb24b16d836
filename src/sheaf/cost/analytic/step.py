"""Seconds of one training step of a published run, as a sum of named terms."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from sheaf.cost.analytic.constants import Book, Constants, Measured, Stack, kind_of
from sheaf.cost.analytic.layers import (
    Amounts,
    Kernels,
    Layer,
    element_bytes,
    head,
    layer,
    layer_parameters,
    network,
    padded_vocabulary,
)
from sheaf.cost.analytic.machine import Machine, machine
from sheaf.cost.analytic.networks import networks
from sheaf.cost.analytic.stages import stage_layers
from sheaf.cost.analytic.workload import Workload
from sheaf.cost.offload import COPY_BYTES_PER_SECOND

TERMS: tuple[str, ...] = (
    "matmul",
    "attention",
    "elementwise",
    "logits",
    "recompute",
    "host",
    "tensor",
    "context",
    "experts",
    "bubble",
    "transfer",
    "gradients",
    "gather",
    "optimizer",
    "fixed",
    "spread",
)
_SHARP = 12.0
_NONE = Amounts()


@dataclass(frozen=True)
class Job:
    """A run made ready to be priced with any constants: all that follows from its shape and its machine."""

    work: Workload
    machine: Machine
    stack: Stack
    book: Book

    @cached_property
    def kind(self) -> str:
        """Generation of its (first) device."""
        return kind_of(self.machine.cluster.hosts[0].device.name)

    @cached_property
    def layer_key(self) -> str:
        """The shape of what one worker computes of a layer, and how: runs that share it share their layers' time."""
        shape, split, work = self.work.shape, self.work.split, self.work
        sizes = (shape.network or shape.family, shape.hidden, shape.heads, shape.kv_heads, shape.ffn, shape.experts)
        parts = (shape.sequence, split.tp, split.cp, split.ep, f"{work.micro:g}")
        kinds = (
            work.precision,
            split.recompute,
            f"zero{split.zero}" if split.zero > 1 else "",
            "lora"[: 4 * work.adapters],
        )
        return " ".join(str(each) for each in (*sizes, *parts, *kinds) if each != "")

    @cached_property
    def layer_keys(self) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
        """Where the book keeps how its model did anywhere, and how its layers did on this stack and device."""
        shape = self.work.shape
        sizes = (shape.network or shape.family, shape.hidden, shape.heads, shape.kv_heads, shape.ffn, shape.experts)
        model = " ".join(str(each) for each in sizes)
        return ("", "", model), (self.stack.name, self.kind, self.layer_key)

    @property
    def precision(self) -> str:
        """Of its products: fp32's are rounded to tf32 by some stacks."""
        return "tf32" if self.work.precision == "fp32" and self.stack.tf32 else self.work.precision

    @cached_property
    def kernels(self) -> Kernels:
        """How its device computes products."""
        known = self.book.kernels
        size = element_bytes(self.work)
        # Loading a tile's edges and starting it take as long as ever where the units multiply slower.
        slower = min(1.0, self.machine.flops_per_second(self.precision) / self.machine.flops_per_second("fp16"))
        return Kernels(
            units=self.machine.multiprocessors,
            edge=known["tile_edge"] * min(1.0, slower * size / 2),
            ramp=known["tile_ramp"] * slower,
            aligned=int(known["aligned_bytes"] // size),
            misaligned=known["misaligned"],
            lined=int(known["line_bytes"] // size),
            unlined=known["unlined"],
        )

    @cached_property
    def layers(self) -> tuple[tuple[float, Layer], ...]:
        """Kinds of layers with how many of all there are of each."""
        shape = self.work.shape
        if shape.network:
            winograd = self.book.kernels["winograd"] if self.precision == "fp32" else 1.0
            return ((1.0, network(self.work, winograd)),)
        dense = layer(self.work, self.stack, self.kernels)
        if not shape.expert_layers:
            return ((1.0, dense),)
        share = shape.expert_layers / shape.layers
        return ((1 - share, dense), (share, layer(self.work, self.stack, self.kernels, expert=True)))

    @cached_property
    def head(self) -> tuple[Amounts, Amounts]:
        """Projection and loss."""
        return (_NONE, _NONE) if self.work.shape.network else head(self.work, self.stack, self.kernels)

    @cached_property
    def head_both(self) -> Amounts:
        """Both of its passes, for each of the tokens that are predicted at once."""
        return (self.head[0] + self.head[1]).times(1.0 + self.work.shape.ahead)

    @cached_property
    def stages(self) -> tuple[float, ...]:
        """Layers of each stage."""
        return stage_layers(self.work)

    @cached_property
    def parameters(self) -> tuple[float, float]:
        """Of one worker, on the stage that holds most: those reduced over all replicas, and those of experts."""
        work = self.work
        shape, split = work.shape, work.split
        if shape.network:
            return networks()[shape.network].parameters, 0.0
        own, experts = layer_parameters(shape)
        if shape.expert_layers:
            share = shape.expert_layers / shape.layers
            routed = layer_parameters(shape, expert=True)
            own, experts = own * (1 - share) + routed[0] * share, routed[1] * share
        table = padded_vocabulary(work, self.stack) * shape.hidden / split.tp
        layers = self.stages
        held = [count * own / split.tp for count in layers]
        held[0] += table
        if split.pp > 1 or not shape.tied:
            held[-1] += table
        most = max(range(len(held)), key=held.__getitem__)
        return held[most], layers[most] * experts / (split.tp * split.ep)


def job(work: Workload, book: Book) -> Job:
    """Everything about a run that does not depend on fitted constants. Raises Refused for an unknown device."""
    found = machine(work)
    device = found.cluster.hosts[0].device.name
    stack = book.stack(work.software, work.notes)
    return Job(work, found, book.facts(stack, model=work.model, device=device, precision=work.precision), book)


def seconds(
    job: Job, constants: Constants, measured: Mapping[tuple[str, str, str], Measured] | None = None
) -> dict[str, float]:
    """Seconds by term, adding up to the step; every term of TERMS is there.

    Where runs with layers of this very shape were ``measured`` (the book's, unless given), the layers' terms are
    scaled to them.
    """
    known = job.book.measured if measured is None else measured
    factor = math.prod(known[key].factor for key in job.layer_keys if key in known)
    return _Pricing(job, constants, factor).terms()


class _Pricing:
    """One run with one set of constants."""

    def __init__(self, job: Job, constants: Constants, factor: float) -> None:
        self.job, self.constants, self.factor = job, constants, factor
        self.work, self.machine = job.work, job.machine
        precision = job.precision
        rate = self.machine.flops_per_second(precision) * constants.matmul
        narrow = precision in ("fp8", "fp4")
        self.product_rate = rate * (constants.narrow if narrow else 1.0)
        self.attention_rate = (
            self.machine.flops_per_second("bf16" if narrow else precision) * constants.matmul * constants.attention
        )
        self.memory_rate = self.machine.memory_bytes_per_second * constants.memory
        split = self.work.split
        self.tensor_group = self.machine.group(split.tp)
        self.calls_seconds = constants.intra_seconds * split.tp / 2
        self.crowd = 1 + constants.lockstep * (split.tp / self.machine.island) ** 3
        hides = (split.overlap or split.sequence or job.stack.hides) and not job.stack.hides_nothing
        self.shown = min(1.0, constants.exposed_tensor) if hides else 1.0

    def parts(self, amounts: Amounts) -> dict[str, float]:
        """Seconds of one pass by term."""
        parts = {
            "matmul": (amounts.product + amounts.grouped / min(1.0, self.constants.grouped)) / self.product_rate,
            "attention": amounts.attention / self.attention_rate,
            "elementwise": amounts.moved / self.memory_rate,
        }
        if amounts.tensor_bytes:
            each = amounts.tensor_bytes / amounts.tensor_calls
            ring = self.machine.ring_seconds(
                self.tensor_group, each, intra=self.constants.intra, inter=self.constants.inter, rounds=2.0
            )
            parts["tensor"] = amounts.tensor_calls * (ring * self.shown + self.calls_seconds)
        if amounts.context_bytes:
            split = self.work.split
            group = self.machine.group(split.tp * split.cp)
            rate = self.machine.intra_bytes_per_second * self.constants.intra
            if group.hosts > 1:
                rate = min(rate, self.machine.host_bytes_per_second / self.machine.island * self.constants.inter)
            # keys and values travel while attention computes
            parts["context"] = max(0.0, amounts.context_bytes / rate - parts["attention"]) + 0.1 * (
                amounts.context_bytes / rate
            )
        if amounts.expert_bytes:
            parts["experts"] = self._sent_to_experts(amounts.expert_bytes)
        return parts

    def _sent_to_experts(self, size_bytes: float) -> float:
        split = self.work.split
        group = self.machine.group(split.ep, split.tp * split.cp)
        chosen = max(1, self.work.shape.experts_per_token)
        outside = 0.0
        if group.hosts > 1:  # a token crosses once to each other host that holds one of its experts (DeepSeek-AI 2024)
            reached = group.hosts * (1 - (1 - 1 / group.hosts) ** chosen)
            outside = reached * (1 - 1 / group.hosts) / chosen
        inside = (1 - outside) * size_bytes / (self.machine.intra_bytes_per_second * self.constants.intra)
        rate = self.machine.host_bytes_per_second / self.machine.island * self.constants.inter
        longest = max(inside, outside * size_bytes / rate)
        shown = min(1.0, self.constants.exposed_experts) if self.job.stack.sends_beside else 1.0
        return longest * shown + 2 * self.constants.intra_seconds

    def terms(self) -> dict[str, float]:
        """All of them."""
        job, work, constants = self.job, self.work, self.constants
        terms: dict[str, float] = dict.fromkeys(TERMS, 0.0)
        layer_parts, head_parts, host_layer = self._microbatch()
        layer_parts = {term: self.factor * value for term, value in layer_parts.items()}
        host_layer *= self.factor
        layer_seconds = sum(layer_parts.values())
        head_seconds = sum(head_parts.values()) * constants.head
        stages = job.stages
        last = len(stages) - 1
        ends = self.job.book.kernels["end_layers"] * host_layer / 2
        devices = [count * layer_seconds + (head_seconds if s == last else 0.0) for s, count in enumerate(stages)]
        each = [
            _longer(count * layer_seconds, count * host_layer)
            + (_longer(head_seconds, ends) if s == last else 0.0)
            + (ends if s == 0 else 0.0)
            for s, count in enumerate(stages)
        ]
        slowest = max(range(len(each)), key=each.__getitem__)
        times = work.accumulated
        for term, value in layer_parts.items():
            terms[term] += times * stages[slowest] * value
        if slowest == last:
            terms["logits"] = times * head_seconds
        terms["host"] = times * (each[slowest] - devices[slowest])
        chunks = work.split.virtual
        terms["bubble"] = (sum(each) - each[slowest]) / chunks
        terms["transfer"] = self._transfers(times, len(stages))
        self._replicas(terms, each[slowest])
        terms["optimizer"] = self._update()
        terms["fixed"] = constants.step_seconds
        terms["spread"] = (
            sum(terms.values()) * constants.spread * math.log2(max(1.0, work.workers / self.machine.island))
        )
        return terms

    def _microbatch(self) -> tuple[dict[str, float], dict[str, float], float]:
        """Of a mean layer: device seconds by term, the head's, and the host's."""
        mean: dict[str, float] = {}
        host = 0.0
        for share, one in self.job.layers:
            for term, value in self.parts(one.both).items():
                mean[term] = mean.get(term, 0.0) + share * value
            again = self.parts(one.again)
            sent = again.pop("tensor", 0.0)
            mean["tensor"] = mean.get("tensor", 0.0) + share * sent
            mean["recompute"] = mean.get("recompute", 0.0) + share * sum(again.values())
            passes = 3.0 + (1.0 if one.again.product or one.again.moved else 0.0)
            host += share * passes * one.launches * self.constants.layer_seconds * self.crowd
        host *= self.job.stack.launched
        return mean, self.parts(self.job.head_both), host

    def _transfers(self, times: int, stages: int) -> float:
        if stages == 1:
            return 0.0
        work, split = self.work, self.work.split
        size = work.micro * work.shape.sequence / split.cp * work.shape.hidden * element_bytes(work)
        if self.job.stack.scatter or split.sequence:
            size /= split.tp
        between = split.workers // split.pp
        if between >= self.machine.island:  # all workers of a host send to another host at once
            rate = self.machine.host_bytes_per_second / self.machine.island * self.constants.inter
        elif work.workers > self.machine.island:
            rate = self.machine.host_bytes_per_second / between * self.constants.inter
        else:
            rate = self.machine.intra_bytes_per_second * self.constants.intra
        messages = times * split.virtual
        shown = messages * min(1.0, self.constants.transfer) + stages - 1
        seconds = 2 * size / rate * shown + 2 * self.constants.intra_seconds * (messages + stages - 1)
        if self.job.stack.scatter and not split.sequence:  # put together again by the workers of the next stage's layer
            link = {"intra": self.constants.intra, "inter": self.constants.inter}
            seconds += 2 * shown * self.machine.ring_seconds(self.tensor_group, size * split.tp, rounds=1.0, **link)
        return seconds

    def _replicas(self, terms: dict[str, float], microbatch: float) -> None:
        """Gradients and gathered parameters, as far as computation does not hide them."""
        work, split, stack = self.work, self.work.split, self.job.stack
        replicas = split.dp * split.cp
        own, experts = self.job.parameters
        if work.adapters:
            own, experts = own * 0.005, experts * 0.005
        if replicas == 1:
            return
        constants = self.constants
        ring = {"intra": constants.intra, "inter": constants.inter}
        gradient, copy = float(stack.gradient_bytes), 4.0 if work.precision in ("fp32", "tf32") else 2.0
        gradient = max(gradient, copy)
        if split.zero < 2:
            group = self.machine.group(replicas, split.tp)
            rounds = (gradient + copy) / gradient if split.zero or stack.distributed else 2.0
            total = self.machine.ring_seconds(group, own * gradient, rounds=rounds, **ring)
            if experts:
                apart = self.machine.group(max(1, replicas // split.ep), split.tp * split.ep)
                total += self.machine.ring_seconds(apart, experts * gradient, rounds=rounds, **ring)
            window = microbatch * 0.6 if stack.overlaps else 0.0
            terms["gradients"] = self._shown(total, window)
            return
        group = self.machine.group(max(split.shards, 1), split.tp)
        gathers = 2.0 if split.zero == 3 else 1.0
        parameters = own + experts
        gathered = gathers * self.machine.ring_seconds(group, parameters * copy, rounds=1.0, **ring)
        reduced = self.machine.ring_seconds(group, parameters * gradient, rounds=1.0, **ring)
        shown = self._shown(gathered + reduced, microbatch if stack.overlaps else 0.0) * work.accumulated
        terms["gather"] = shown * gathered / (gathered + reduced) if shown else 0.0
        terms["gradients"] = shown - terms["gather"]
        copies = replicas // max(1, split.shards)
        if copies > 1:
            apart = self.machine.group(copies, split.tp * split.shards)
            size = parameters * gradient / split.shards
            terms["gradients"] += self._shown(
                self.machine.ring_seconds(apart, size, rounds=2.0, **ring), microbatch * 0.3
            )

    def _shown(self, total: float, window: float) -> float:
        hidden = min((1 - min(1.0, self.constants.exposed)) * total, window)
        return total - hidden

    def _update(self) -> float:
        split = self.work.split
        own, experts = self.job.parameters
        if self.work.adapters:
            return 0.0
        spread = split.shards if split.zero else split.dp * split.cp if self.job.stack.distributed else 1
        moved = (own + experts) / spread * self.job.book.kernels["update_bytes"]
        rate = self.machine.memory_bytes_per_second * self.constants.optimizer
        apart = (own + experts) / spread * 16 / COPY_BYTES_PER_SECOND
        return moved / rate + (apart if split.offload else 0.0)


def _longer(device: float, host: float) -> float:
    """The longer of both, rounded where they are alike: neither is steady."""
    most = max(device, host, 1e-12)
    return most * ((device / most) ** _SHARP + (host / most) ** _SHARP) ** (1 / _SHARP)
