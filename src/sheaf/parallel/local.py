"""Local steps: each replica steps by the gradients of its own microbatches; every H steps weights meet."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sheaf.cluster.primitives import Pending
from sheaf.parallel.alike import Alike
from sheaf.parallel.compression import AbstractCompressor, compressor
from sheaf.parallel.exchange import Exchange
from sheaf.parallel.holding import Factor
from sheaf.parallel.meeting import adasum, mixed, neighbours
from sheaf.parallel.optimizers import learning_rate
from sheaf.parallel.outer import Outer
from sheaf.parallel.portion import Portion
from sheaf.parallel.replicated import Replicated
from sheaf.parallel.runner import Expectation
from sheaf.parallel.spread import Spread
from sheaf.plans import Plan
from sheaf.plans.layout import fragments
from sheaf.plans.local import Local

# Of what workers found while a fragment travelled, this share stays (Douillard et al., "Streaming DiLoCo", 2025, 2.3).
MIXED = 0.5


class Fragment:
    """Some of the parameters, which meet together: the weights they met at last, and what travels of them."""

    def __init__(self, parameters: Mapping[str, Tensor], outer: Outer, *, anchored: bool) -> None:
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.weight = torch.zeros((), dtype=torch.float64)  # of the losses this worker stepped by since they met
        flat = self.flat()
        self.anchor = flat if anchored else None
        self.velocity = torch.zeros_like(flat) if outer.keeps else None
        self.travelling = torch.zeros_like(flat)
        self.due = torch.full((), -1)  # the step after which what travels is taken; none: -1
        self.rate = torch.zeros((), dtype=torch.float64)
        self.pending: Pending | None = None

    def flat(self) -> Tensor:
        """This worker's weights, end to end."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])

    def put(self, flat: Tensor, kept: float = 0.0) -> None:
        """Set the weights, but for a share ``kept`` of what they are."""
        sizes = [parameter.numel() for parameter in self.parameters]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, flat.split(sizes), strict=True):
                parameter.lerp_(value.view(parameter.shape).to(parameter.dtype), 1 - kept)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must keep, live."""
        named = {"weight": self.weight, "due": self.due, "rate": self.rate, "travelling": self.travelling}
        optional = {"anchor": self.anchor, "velocity": self.velocity}
        return named | {name: value for name, value in optional.items() if value is not None}


class LocalSteps(Replicated):
    """As replicated, but that after the plan's first ``after`` steps gradients stay with each replica.

    A replica's gradient is that of the mean of its own losses, and when weights meet each replica counts by the weight
    of what it has seen since: so one plain SGD step between meetings is what all-reduce computes. Stich, "Local SGD
    Converges Fast and Communicates Little", 2019. Where weights meet those of neighbours only, each replica counts the
    same, and its gradient has the size that makes the mean of all of them the serial one.

    A replica may be several workers, that split layers or have stages. Each meets those that hold the same; then
    copies within the replica are made the same (``alike``).
    """

    def __init__(
        self,
        portion: Portion,
        spread: Spread,
        factor: Factor,
        plan: Plan,
        exchange: Exchange,
        expectation: Expectation,
        tied: Sequence[str] = (),
    ) -> None:
        world = spread.replicas
        super().__init__(portion, world, factor, plan.bucket_bytes)
        self._spread, self._exchange, self._expectation = spread, exchange, expectation
        self._slices = portion.slices
        self._local: Local = plan.meets_locally
        self._outer = Outer(self._local.kind, self._local.lr, self._local.momentum)
        self._steps = torch.zeros((), dtype=torch.int64)
        self._compression = plan.compression
        anchored = self._outer.keeps or self._compression.kind != "none" or self._local.overlap > 0
        anchored = anchored or self._local.kind == "adasum"
        # of the whole model, so that all stages and slices of a parameter meet at the same step
        every = {name: fake for name, fake in portion.blueprint.parameters.items() if fake.requires_grad}
        sized = [(name, fake.numel(), str(portion.dtype_of(fake))) for name, fake in every.items()]
        grouped = fragments(sized, self._local.fragments)
        self._offsets = [index * self._local.every // len(grouped) for index in range(len(grouped))]
        self._fragments: dict[int, Fragment] = {}
        self._fragment_compressors: dict[int, AbstractCompressor] = {}
        for index, names in enumerate(grouped):
            mine = {name: self.parameters[name] for name in names if name in self.parameters}
            if not mine:
                continue
            made = self._fragments[index] = Fragment(mine, self._outer, anchored=anchored)
            if self._compression.kind != "none":
                shapes = [value.shape for value in made.parameters]
                self._fragment_compressors[index] = compressor(self._compression, world, made.travelling, shapes)
        self._alike: list[Alike] = []
        if plan.tp > 1:
            whole = [name for name in every if name in self.parameters and name not in portion.slices]
            self._alike.append(Alike(whole, spread.parted, portion, gives=spread.leads))
        if tied:
            trained = [name for name in tied if name in every]
            self._alike.append(Alike(trained, spread.copies, portion, gives=True))

    @property
    def distinct(self) -> bool:
        return True

    @property
    def meets_weights(self) -> bool:
        return not self.together

    @property
    def together(self) -> bool:
        """Whether gradients meet in this step."""
        return int(self._steps) < self._local.after

    @property
    def touched(self) -> set[str]:
        return super().touched if self.together or self._own_weight() else set()

    def arm(self, *, last: bool) -> None:
        if self.together:
            super().arm(last=last)

    def flush(self) -> None:
        if self.together:
            super().flush()

    def finish(self, used: set[str]) -> None:
        if self.together:
            super().finish(used)
            return
        weight = self._own_weight()
        if not weight:  # all its samples were padding: nothing to step by, and nothing moves by momentum or decay
            for parameter in self.parameters.values():
                parameter.grad = None
        gradients = list(self.held().values())
        if gradients:
            counted = self._exchange.told().weight / self._world.workers if self._local.graph else weight
            torch._foreach_mul_(gradients, self._expectation.weight / counted)

    def after_update(self) -> None:
        """Count the step; start the meetings that are due, and end those that have travelled long enough."""
        together = self.together
        self._steps += 1
        step = int(self._steps)
        weight = 0.0 if together or self._local.graph else self._own_weight()
        for index, fragment in self._fragments.items():
            if together:  # weights are everywhere the same
                if fragment.anchor is not None:
                    fragment.anchor.copy_(fragment.flat())
                continue
            fragment.weight += weight
            if self._begins(index, step):
                self._end(fragment)  # the last meeting, where it travels as long as this one waited
                self._begin(index, step)
            if 0 <= int(fragment.due) <= step:
                self._end(fragment)
        if any(self._begins(index, step - self._local.overlap) for index in range(len(self._offsets))):
            for alike in self._alike:
                alike.meet(self.parameters)

    def loaded(self) -> None:
        """Nothing: every worker has its own."""

    def full_parameters(self) -> dict[str, Tensor]:
        """The mean of the workers' weights, each counted by what it has seen since weights met (collective)."""
        whole = {name: value.detach() for name, value in self.parameters.items()}
        for fragment in self._fragments.values():
            mean = fragment.flat() * self._share(fragment)
            self._world.wait(self._world.all_reduce(mean, "weights"))
            sizes = [parameter.numel() for parameter in fragment.parameters]
            for name, value in zip(fragment.names, mean.split(sizes), strict=True):
                whole[name] = value.view(whole[name].shape)
        return whole

    def kept(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.parameters.items()}

    def full_gradients(self) -> dict[str, Tensor]:
        """The mean of the workers' gradients by the weight of their losses: the serial one where weights are equal."""
        if self.together:
            return super().full_gradients()
        weight = 1.0 if self._local.graph else self._own_weight()
        total = float(self._world.summed(torch.tensor([weight], dtype=torch.float64), "weights of losses")[0])
        whole: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad * (weight / total)
                self._world.wait(self._world.all_reduce(gradient, f"gradient of {name}"))
                whole[name] = gradient
        return whole

    def extra(self) -> dict[str, Tensor]:
        named = {"steps": self._steps}
        for index, fragment in self._fragments.items():
            self._arrive(fragment)
            compress = self._fragment_compressors.get(index)
            named |= {f"fragment{index}/{name}": value for name, value in fragment.tensors().items()}
            named |= {f"fragment{index}/{name}": value for name, value in (compress.kept() if compress else {}).items()}
        return named

    def _own_weight(self) -> float:
        """The weight of the losses of this worker's replica in the step under way."""
        if self._spread.alone:
            return self._exchange.own_weight
        told, replica = self._exchange.told(), self._spread.place.dp
        dealt = self._spread.dealt(told.counts)
        start = sum(dealt[:replica])
        return math.fsum(told.weights[start : start + dealt[replica]])

    def _begins(self, index: int, step: int) -> bool:
        """Whether a fragment, of whoever holds it, begins to meet after so many steps."""
        first = self._local.after + self._offsets[index]
        return step > self._local.after and (step - first) % self._local.every == 0

    def _share(self, fragment: Fragment) -> float:
        """Which part of the mean this worker's weights are (collective)."""
        total = float(self._world.summed(fragment.weight.reshape(1).clone(), "weights of losses")[0])
        return float(fragment.weight) / total if total else 1 / self._world.workers

    def _begin(self, index: int, step: int) -> None:
        fragment, compress = self._fragments[index], self._fragment_compressors.get(index)
        mine = fragment.flat()
        away = mine if fragment.anchor is None else fragment.anchor - mine
        fragment.due.fill_(step + self._local.overlap)
        if self._local.graph:
            meeting = (step - self._local.after - self._offsets[index]) // self._local.every - 1
            fragment.travelling.copy_(
                mixed(self._world, away, neighbours(self._local.kind, self._world.workers, meeting))
            )
            return
        if self._local.kind == "adasum":
            sizes = [parameter.numel() for parameter in fragment.parameters]
            adasum(self._world, away, sizes, lambda dots: self._of_whole_layers(fragment, dots))
            fragment.travelling.copy_(away)
            fragment.weight.zero_()
            return
        torch.mul(away, self._share(fragment), out=fragment.travelling)
        fragment.weight.zero_()
        if compress is None:
            fragment.pending = self._world.all_reduce(fragment.travelling, "weights")
        else:
            fragment.pending = compress.start(fragment.travelling)

    def _of_whole_layers(self, fragment: Fragment, dots: Tensor) -> Tensor:
        """Sums over layers from those over this worker's slices of them (collective among those that split layers)."""
        sliced = torch.tensor([[float(name in self._slices)] for name in fragment.names], dtype=torch.float64)
        if not self._slices:
            return dots
        return self._spread.parted.summed(dots * sliced, "products of AdaSum") + dots * (1 - sliced)

    def _arrive(self, fragment: Fragment) -> None:
        if fragment.pending is not None:
            self._world.wait(fragment.pending)
            fragment.pending = None

    def _end(self, fragment: Fragment) -> None:
        if int(fragment.due) < 0:
            return
        self._arrive(fragment)
        fragment.due.fill_(-1)
        if fragment.anchor is None:
            fragment.put(fragment.travelling)
            return
        rate = learning_rate(self.optimizer) or 0.0
        before = float(fragment.rate)
        fragment.rate.fill_(rate)
        ratio = rate / before if before else 1.0
        fragment.anchor = self._outer.step(fragment.anchor, fragment.travelling, fragment.velocity, rate_ratio=ratio)
        fragment.put(fragment.anchor, MIXED if self._local.overlap else 0.0)
