"""Local steps: each worker steps by the gradients of its own microbatches; every H steps weights meet."""

import torch
from torch import Tensor

from sheaf.cluster.primitives import Pending
from sheaf.parallel.compression import AbstractCompressor, compressor
from sheaf.parallel.exchange import Exchange
from sheaf.parallel.holding import Factor
from sheaf.parallel.outer import Outer
from sheaf.parallel.portion import Portion
from sheaf.parallel.replicated import Replicated
from sheaf.parallel.runner import Expectation
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.layout import fragments
from sheaf.plans.local import Local

# Of what workers found while a fragment travelled, this share stays (Douillard et al., "Streaming DiLoCo", 2025, 2.3).
MIXED = 0.5


class Fragment:
    """Some of the parameters, which meet together: the weights they met at last, and what travels of them."""

    def __init__(self, parameters: dict[str, Tensor], outer: Outer, *, anchored: bool) -> None:
        self.parameters = list(parameters.values())
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
    """As replicated, but that after the plan's first ``after`` steps gradients stay where they are.

    A worker's gradient is that of the mean of its own losses, and when weights meet each worker counts by the weight of
    what it has seen since: so one plain SGD step between meetings is what all-reduce computes. Stich, "Local SGD
    Converges Fast and Communicates Little", 2019.
    """

    def __init__(
        self,
        portion: Portion,
        world: World,
        factor: Factor,
        plan: Plan,
        exchange: Exchange,
        expectation: Expectation,
    ) -> None:
        super().__init__(portion, world, factor, plan.bucket_bytes)
        self._exchange, self._expectation = exchange, expectation
        self._local: Local = plan.meets_locally
        self._outer = Outer(self._local.kind, self._local.lr, self._local.momentum)
        self._steps = torch.zeros((), dtype=torch.int64)
        self._compression = plan.compression
        anchored = self._outer.keeps or self._compression.kind != "none" or self._local.overlap > 0
        trained = {name: value for name, value in self.parameters.items() if value.requires_grad}
        grouped = fragments(
            [(name, value.numel(), str(value.dtype)) for name, value in trained.items()], self._local.fragments
        )
        self._fragments = [
            Fragment({name: trained[name] for name in names}, self._outer, anchored=anchored) for names in grouped
        ]
        self._fragment_compressors: list[AbstractCompressor | None] = [
            compressor(self._compression, world, each.travelling, [value.shape for value in each.parameters])
            if self._compression.kind != "none"
            else None
            for each in self._fragments
        ]

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
        gradients, weight = list(self.held().values()), self._exchange.own_weight
        if gradients and weight:  # without any, all its samples were padding, and its gradients are zero
            torch._foreach_mul_(gradients, self._expectation.weight / weight)

    def after_update(self) -> None:
        """Count the step; start the meetings that are due, and end those that have travelled long enough."""
        together = self.together
        self._steps += 1
        step = int(self._steps)
        for index, fragment in enumerate(self._fragments):
            if together:  # weights are everywhere the same
                if fragment.anchor is not None:
                    fragment.anchor.copy_(fragment.flat())
                continue
            fragment.weight += self._exchange.own_weight
            offset = index * self._local.every // len(self._fragments)
            if (step - self._local.after - offset) % self._local.every == 0:
                self._end(fragment)  # the last meeting, where it travels as long as this one waited
                self._begin(index, step)
            if 0 <= int(fragment.due) <= step:
                self._end(fragment)

    def loaded(self) -> None:
        """Nothing: every worker has its own."""

    def full_parameters(self) -> dict[str, Tensor]:
        """The mean of the workers' weights, each counted by what it has seen since weights met (collective)."""
        whole = {name: value.detach() for name, value in self.parameters.items()}
        by_id = {id(value): name for name, value in self.parameters.items()}
        for fragment in self._fragments:
            mean = fragment.flat() * self._share(fragment)
            self._world.wait(self._world.all_reduce(mean, "weights"))
            for parameter, value in zip(
                fragment.parameters, mean.split([each.numel() for each in fragment.parameters]), strict=True
            ):
                whole[by_id[id(parameter)]] = value.view(parameter.shape)
        return whole

    def kept(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.parameters.items()}

    def full_gradients(self) -> dict[str, Tensor]:
        """The mean of the workers' gradients by the weight of their losses: the serial one where weights are equal."""
        if self.together:
            return super().full_gradients()
        weight = self._exchange.own_weight
        total = float(self._world.summed(torch.tensor([weight], dtype=torch.float64), "weights of losses")[0])
        whole: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad * (weight / total)
                self._world.wait(self._world.all_reduce(gradient, f"gradient of {name}"))
                whole[name] = gradient
        return whole

    def extra(self) -> dict[str, Tensor]:
        for fragment in self._fragments:
            self._arrive(fragment)
        named = {"steps": self._steps}
        for index, (fragment, compress) in enumerate(zip(self._fragments, self._fragment_compressors, strict=True)):
            named |= {f"fragment{index}/{name}": value for name, value in fragment.tensors().items()}
            named |= {f"fragment{index}/{name}": value for name, value in (compress.kept() if compress else {}).items()}
        return named

    def _share(self, fragment: Fragment) -> float:
        """Which part of the mean this worker's weights are (collective)."""
        total = float(self._world.summed(fragment.weight.reshape(1).clone(), "weights of losses")[0])
        return float(fragment.weight) / total if total else 1 / self._world.workers

    def _begin(self, index: int, step: int) -> None:
        fragment, compress = self._fragments[index], self._fragment_compressors[index]
        mine = fragment.flat()
        away = mine if fragment.anchor is None else fragment.anchor - mine
        torch.mul(away, self._share(fragment), out=fragment.travelling)
        fragment.weight.zero_()
        if compress is None:
            fragment.pending = self._world.all_reduce(fragment.travelling, "weights")
        else:
            fragment.pending = compress.start(fragment.travelling)
        fragment.due.fill_(step + self._local.overlap)

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
        rate = float(self.optimizer.param_groups[0]["lr"])
        before = float(fragment.rate)
        fragment.rate.fill_(rate)
        ratio = rate / before if before else 1.0
        fragment.anchor = self._outer.step(fragment.anchor, fragment.travelling, fragment.velocity, rate_ratio=ratio)
        fragment.put(fragment.anchor, MIXED if self._local.overlap else 0.0)
