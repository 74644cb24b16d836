"""The reference: the task trained by a plain PyTorch loop in one process, with nothing of the executors it judges."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sheaf.errors import NonFiniteLoss
from sheaf.parity.arithmetic import Arithmetic
from sheaf.parity.observation import START, Observation, Prints, persistent_buffers
from sheaf.task import PRECISIONS, Order, Streams, Task, arguments, as_loss, fetch, key, moved
from sheaf.task.blueprint import Blueprint

AS_WRITTEN = Arithmetic()


def train(
    task: Task,
    steps: int,
    *,
    microbatch: int,
    device: torch.device,
    arithmetic: Arithmetic = AS_WRITTEN,
    follow: Callable[[int], Observation] | None = None,
) -> Iterator[Observation]:
    """Yield what was there at the start, then each of ``steps`` steps.

    With ``follow`` (step -> another run's observation) every step starts from the other run's weights and buffers, and
    the optimizer is given the other run's gradients once this run's own have been recorded: losses, gradients and
    buffers then tell whether the other run computed this step rightly, weights whether it updated rightly, and no
    error of an earlier step is counted again.

    Raises NonFiniteLoss naming the step and microbatch.
    """
    run = _Serial(task, microbatch, device, arithmetic)
    try:
        yield run.start()
        for step in range(steps):
            yield run.step(step, (follow(step - 1), follow(step)) if follow else None)
    finally:
        run.close()


class _Serial:
    def __init__(self, task: Task, microbatch: int, device: torch.device, arithmetic: Arithmetic) -> None:
        self.task, self.device, self.arithmetic = task, device, arithmetic
        self.order = Order(task.num_samples, task.batch, microbatch, task.seed, shuffle=task.shuffle)
        self.model = Blueprint(task).fill(device)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = task.optimizer(list(self.model.parameters()))
        self.scheduler = task.scheduler(self.optimizer) if task.scheduler else None
        self.scaler = torch.amp.GradScaler(device.type) if task.precision == "fp16" else None
        self.streams = Streams(self.model, task.seed, device)
        self.expected = float(task.batch)  # a step's weight is known after its last forward: divide by the last one's
        self.microbatch: int | None = None
        self.prints = Prints(self.model, lambda: self.microbatch)

    def start(self) -> Observation:
        return Observation(step=START, weights=self._weights(), buffers=_copied(persistent_buffers(self.model)))

    def step(self, step: int, followed: tuple[Observation, Observation] | None) -> Observation:
        if followed:
            self._place(followed[0])
        before = self._weights()
        losses = self._gradients(step)
        weight = math.fsum(weight for _, weight in losses.values())
        skipped = overflowed = self._divide(weight)
        gradients = {} if overflowed else {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        gradients = _copied({name: gradient.to_dense() for name, gradient in gradients.items()})
        if followed:
            skipped = followed[1].skipped
            self._take(followed[1].gradients)
        loss = math.fsum(total for total, _ in losses.values()) / weight
        if not skipped:
            self._clip()
            self.optimizer.step()
            self._schedule(loss)
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        after = self._weights()
        return Observation(
            step=step,
            loss=loss,
            skipped=overflowed,
            losses=losses,
            prints=self.prints.take(),
            moves={name: _norm(after[name] - before[name]) for name in after},
            gradients=gradients,
            weights=after,
            buffers=_copied(persistent_buffers(self.model)),
        )

    def close(self) -> None:
        self.streams.close()
        self.prints.close()

    def _gradients(self, step: int) -> dict[int, tuple[float, float]]:
        """Leave the gradient of the sum of all sums in ``.grad``; give each microbatch's sum and weight."""
        microbatches = self.order.step(step)
        parts = min(self.arithmetic.parts, len(microbatches))
        partial: list[dict[str, Tensor]] = []
        losses: dict[int, tuple[float, float]] = {}
        for microbatch in microbatches:
            if microbatch.index * parts // len(microbatches) > len(partial):
                partial.append(self._take({}))
            total, weight = self._forward(step, microbatch.index, microbatch.samples)
            losses[microbatch.index] = total.item(), weight
            if not math.isfinite(total.item()):
                raise NonFiniteLoss(step, microbatch.index, total.item())
            with self.arithmetic.applied():
                scaled = total if self._late else total * (1 / self.expected)
                (self.scaler.scale(scaled) if self.scaler else scaled).backward()
        partial.append(self._take({}))
        gradients = partial.pop()
        for earlier in reversed(partial):
            for name, gradient in earlier.items():
                gradients[name] = gradient + gradients[name] if name in gradients else gradient
        self._take(gradients)
        return losses

    def _forward(self, step: int, index: int, samples: tuple[int, ...]) -> tuple[Tensor, float]:
        task = self.task
        batch = fetch(task, samples, key(task.seed, "data", step, index))
        batch = moved(batch, self.device, torch.float64 if task.precision == "fp64" else None)
        self.streams.enter(step, index)
        self.microbatch = index
        with self.arithmetic.applied(), autocast(task, self.device):
            positional, named = arguments(task, batch)
            loss = as_loss(task.loss(self.model(*positional, **named), batch), len(samples))
        self.microbatch = None
        return loss.sum.reshape(()), float(loss.weight)

    def _divide(self, weight: float) -> bool:
        """Make the gradient that of the step's loss; whether fp16 overflowed."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        factor = (1.0 if self._late else self.expected) / weight
        for gradient in gradients if factor != 1.0 else ():
            gradient.mul_(factor)
        self.expected = weight
        return self.scaler is not None and not all(gradient.isfinite().all() for gradient in gradients)

    @property
    def _late(self) -> bool:
        return self.arithmetic.late and self.scaler is None  # which steps overflow in fp16 depends on it

    def _schedule(self, loss: float) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            self.scheduler.step()

    def _clip(self) -> None:
        if self.task.clip is None:
            return
        parameters = list(self.parameters.values())
        if self.arithmetic.parts == 1:
            torch.nn.utils.clip_grad_norm_(parameters, self.task.clip)
        else:
            norm = self.arithmetic.total_norm([p.grad for p in parameters if p.grad is not None])
            torch.nn.utils.clip_grads_with_norm_(parameters, self.task.clip, norm)

    def _weights(self) -> dict[str, Tensor]:
        return _copied(self.parameters)

    @torch.no_grad()
    def _place(self, observation: Observation) -> None:
        for name, tensor in {**self.parameters, **persistent_buffers(self.model)}.items():
            other = observation.weights.get(name, observation.buffers.get(name))
            if other is not None and other.shape == tensor.shape:
                tensor.copy_(other)

    def _take(self, gradients: Any) -> dict[str, Tensor]:
        """Put other gradients in; give those that were there."""
        held: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                held[name] = parameter.grad
            other = gradients.get(name)
            if not isinstance(other, Tensor) or other.shape != parameter.shape:
                parameter.grad = None
                continue
            other = other.to(parameter.device, parameter.dtype)
            sparse = name in held and held[name].is_sparse and not other.is_sparse
            parameter.grad = other.to_sparse(held[name].sparse_dim()) if sparse else other
        return held


def autocast(task: Task, device: torch.device) -> torch.autocast:
    """The precision in which the task computes; over float32 weights for bf16 and fp16, else nothing."""
    low = task.precision in ("bf16", "fp16")
    return torch.autocast(device.type, PRECISIONS[task.precision] if low else torch.bfloat16, enabled=low)


def _copied(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() if tensor.is_floating_point() else 0.0
