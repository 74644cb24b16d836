"""What a worker holds that goes from meeting to meeting by its own clock, and how it meets those who are there."""

from collections.abc import Sequence

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from sheaf.parallel.holding import Factor, laid_as
from sheaf.parallel.meeting import summed_among
from sheaf.parallel.optimizers import learning_rate
from sheaf.parallel.outer import Outer
from sheaf.parallel.portion import Portion
from sheaf.parallel.replicated import Replicated
from sheaf.parallel.world import World
from sheaf.plans import Plan


class Meeting:
    """Tensors of one dtype that meet: ``anchor`` is what they were after the last meeting, ``carried`` what this worker
    brings that was late for one, times its weight.
    """

    def __init__(self, tensors: Sequence[Tensor], outer: Outer) -> None:
        self.tensors = list(tensors)
        self.anchor = self.flat()
        self.velocity = torch.zeros_like(self.anchor) if outer.keeps else None
        self.carried = torch.zeros_like(self.anchor)
        self._outer = outer

    def flat(self) -> Tensor:
        """The tensors as they are, end to end."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])

    def put(self) -> None:
        """Make the tensors what they were after the last meeting."""
        sizes = [tensor.numel() for tensor in self.tensors]
        with torch.no_grad():
            for tensor, value in zip(self.tensors, self.anchor.split(sizes), strict=True):
                tensor.copy_(value.view(tensor.shape))

    def brought(self, weight: float) -> Tensor:
        """How far this worker's tensors have come, times ``weight``, and what it carries."""
        return (self.anchor - self.flat()) * weight + self.carried

    def take(self, departure: Tensor, rate_ratio: float) -> None:
        """The meeting's mean departure."""
        self.anchor = self._outer.step(self.anchor, departure, self.velocity, rate_ratio=rate_ratio)
        self.put()

    def known(self) -> dict[str, Tensor]:
        """What all know who have been at the last meeting, live."""
        return {"anchor": self.anchor} | ({} if self.velocity is None else {"velocity": self.velocity})


class OwnPace(Replicated):
    """A whole model on this worker, whose gradients stay here.

    ``carried_weight`` is the weight of what was late for a meeting and goes to the next one; ``weight`` that of the
    losses it has stepped by since the last one. BatchNorm's running statistics (``moving``) meet as means.
    """

    def __init__(self, portion: Portion, everyone: World, factor: Factor, plan: Plan) -> None:
        alone = World(everyone.device, among=[[rank] for rank in range(everyone.workers)])
        super().__init__(portion, alone, factor, plan.bucket_bytes)
        self._everyone, self._local = everyone, plan.meets_locally
        self.weight = torch.zeros((), dtype=torch.float64)
        self.carried_weight = torch.zeros((), dtype=torch.float64)
        self.rate = torch.zeros((), dtype=torch.float64)
        self.meetings: list[Meeting] = []

    def meets(self, moving: Sequence[Tensor]) -> None:
        """Begin from the weights as they are; ``moving`` tensors meet too."""
        outer = Outer(self._local.kind, self._local.lr, self._local.momentum)
        trained = [value for value in self.parameters.values() if value.requires_grad]
        mean = Outer("average", 1.0, 0.0)
        groups = [([] if self.by_gradients else trained, outer), (moving, mean)]
        for tensors, by in groups:
            for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
                self.meetings.append(Meeting([tensor for tensor in tensors if tensor.dtype == dtype], by))

    @property
    def by_gradients(self) -> bool:
        """Whether gradients meet, and everyone's optimizer steps by their mean."""
        return self._local.kind == "backup"

    @property
    def distinct(self) -> bool:
        return True

    @property
    def trained(self) -> list[str]:
        """Names of the parameters that are trained."""
        return [name for name, value in self.parameters.items() if value.requires_grad]

    def meet(self, present: Sequence[int], total: float) -> None:
        """Meet those who are ``present``, whose weights add up to ``total`` (collective among them)."""
        rate = learning_rate(self.optimizer) or 0.0
        ratio = rate / float(self.rate) if float(self.rate) else 1.0
        for meeting in self.meetings:
            departure = summed_among(self._everyone, present, meeting.brought(self._counted(total)))
            meeting.take(departure / (total or len(present)), ratio)
            meeting.carried.zero_()
        self.rate.fill_(rate)
        self.weight.zero_()
        self.carried_weight.zero_()

    def meet_gradients(self, present: Sequence[int], used: set[str], total: float) -> None:
        """Make gradients the mean of those who are ``present``; parameters that none of them used have none."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            if name in used:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
            else:
                parameter.grad = None
        for parameters in by_dtype.values():
            given = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
            flat = torch.cat([gradient.reshape(-1) for gradient in given]) * float(self.weight)
            found = summed_among(self._everyone, present, flat) / (total or len(present))
            for parameter, value in zip(parameters, found.split([one.numel() for one in parameters]), strict=True):
                parameter.grad = laid_as(parameter, value.view(parameter.shape))

    def miss(self) -> float:
        """The meeting was over: keep what this worker brought for the next, or drop it. Gives the weight dropped."""
        lost = 0.0
        if self._local.late == "merge":
            for meeting in self.meetings:
                meeting.carried = meeting.brought(float(self.weight))
            self.carried_weight += self.weight
        else:
            lost = float(self.weight)
        self.weight.zero_()
        return lost

    def outcome(self, more: dict[str, Tensor]) -> bytes:
        """What a worker needs that missed the meeting, with ``more`` by name."""
        return save({name: value.detach().cpu().contiguous() for name, value in (self._known() | more).items()})

    def adopt(self, content: bytes) -> dict[str, Tensor]:
        """Go on from the outcome of a meeting that this worker missed; gives what was more in it."""
        found = load(content)
        for name, value in self._known().items():
            value.copy_(found.pop(name))
        for meeting in self.meetings:
            meeting.put()
        return found

    def full_parameters(self) -> dict[str, Tensor]:
        """The mean of the workers' weights by what they have seen since the last meeting (collective)."""
        whole = {name: value.detach() for name, value in self.parameters.items()}
        total = float(self._everyone.summed(self.weight.reshape(1).clone(), "weights of losses")[0])
        if not total or self.by_gradients:
            return whole
        for name in self.trained:
            mean = whole[name] * (float(self.weight) / total)
            self._everyone.wait(self._everyone.all_reduce(mean, "weights"))
            whole[name] = mean
        return whole

    def kept(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.parameters.items()}

    def extra(self) -> dict[str, Tensor]:
        named = {"weight": self.weight, "carried_weight": self.carried_weight, "rate": self.rate}
        for index, meeting in enumerate(self.meetings):
            named |= {f"{index}/{name}": value for name, value in meeting.known().items()}
            named[f"{index}/carried"] = meeting.carried
        return named

    def loaded(self) -> None:
        """Nothing: every worker has its own."""

    def _counted(self, total: float) -> float:
        return float(self.weight) if total else 1.0

    def _known(self) -> dict[str, Tensor]:
        return {
            f"meeting/{index}/{name}": value
            for index, meeting in enumerate(self.meetings)
            for name, value in meeting.known().items()
        } | {"rate": self.rate}
