"""One global step under any plan: fetch, forward, backward, gradients meet, clip, update. The same call for all."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sheaf.cluster.traffic import traffic
from sheaf.errors import NonFiniteLoss, PlanError, TaskError
from sheaf.parallel.agreement import Agreement
from sheaf.parallel.devices import memory_bytes
from sheaf.parallel.exchange import Told
from sheaf.parallel.optimizers import learning_rate, load_named_state, named_state
from sheaf.parallel.portion import Portion
from sheaf.parallel.resharding import State, check_cuts, checked, keeps_the_same, resharded
from sheaf.parallel.runner import AbstractRunner
from sheaf.parallel.ties import Ties
from sheaf.parallel.values import decoded, encoded
from sheaf.plans import Plan
from sheaf.plans.shares import updates_alone
from sheaf.record import StepReport
from sheaf.task import Microbatch, Order


@runtime_checkable
class Observer(Protocol):
    """Looks at a step from inside; every worker must have one when any has."""

    def gradients(self, step: int, gradients: dict[str, Tensor]) -> None:
        """Whole gradients by parameter name, before clipping; parameters that nothing used are missing."""
        ...


class Step:
    """Runs one global step each time it is called, on every worker of the plan; made by ``sheaf.build``.

    ``index`` is the number of the next step, ``model`` this worker's module. A call raises on every worker, before
    anything is updated: NonFiniteLoss when a loss is no number, TaskError when no parameter got a gradient, PlanError
    when other parameters are trained than when it was built.
    """

    def __init__(self, plan: Plan, portion: Portion, runner: AbstractRunner, ties: Sequence[Ties] = ()) -> None:
        parts = runner.parts
        assert parts.task.microbatch is not None
        self.task, self.plan = parts.task, plan
        self.index = 0
        self._ties = ties
        self._portion, self._runner, self._spread = portion, runner, parts.spread
        self._world, self._holding = parts.spread.world, parts.holding
        self._exchange, self._expectation, self._scale = parts.exchange, parts.expectation, parts.scale
        task = parts.task
        self._order = Order(task.num_samples, task.batch, parts.task.microbatch, task.seed, shuffle=task.shuffle)
        self._scheduler = task.scheduler(parts.holding.optimizer) if task.scheduler is not None else None
        self._statistics = parts.statistics
        self._observer: Observer | None = None
        self._trained = self._names()
        self._updated = 0.0  # seconds, in the step before, where the other replicas went on without it

    @property
    def model(self) -> nn.Module:
        """This worker's module; under ZeRO-3 its parameters are empty between steps."""
        return self._holding.model

    @property
    def position(self) -> tuple[int, int] | None:
        """The (step, microbatch) that is running; None where what runs counts for nothing."""
        return self._runner.position

    def runs(self, block: str) -> bool:
        """Whether this worker runs a block of the model itself."""
        return self._runner.runs(block)

    @property
    def leads(self) -> bool:
        """Whether this worker speaks for those that compute the same microbatch with it."""
        return self._runner.leads

    @property
    def part(self) -> int:
        """Which slice of a split layer this worker holds."""
        return self._spread.part

    @property
    def losses(self) -> list[tuple[int, float, float]]:
        """The microbatches of the last step that this worker answers for, each with its loss's sum and weight."""
        return self._exchange.mine

    @property
    def spans(self) -> list[tuple[str, int, int, float, float]]:
        """What this worker did of the last step's pipeline: (kind, microbatch of its replica, stage, start, stop).

        Times are those of ``time.perf_counter``. Empty without a pipeline.
        """
        return self._runner.spans

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """This worker's optimizer, over whole parameters or over its slices."""
        return self._holding.optimizer

    @property
    def rank(self) -> int:
        """Which worker this is."""
        return self._world.rank

    @property
    def workers(self) -> int:
        """How many there are."""
        return self._world.workers

    @property
    def gives_whole(self) -> bool:
        """Whether this is the worker that ``full_state`` gives the whole to."""
        return self.rank == 0

    def __call__(self) -> StepReport:
        """Run the next global step; collective."""
        start, waited = time.perf_counter(), self._spread.waited_seconds
        staged, sent = self._spread.stages.waited_seconds, traffic.sent_bytes
        self._runner.compute_seconds = 0.0
        self._check_trained()
        microbatches = self._order.step(self.index)
        self._runner.compute(self.index, microbatches, len(microbatches))
        self._holding.flush()
        told = self._exchange.told()
        self._runner.parts.dealer.finished()
        agreed, used = self._agree(), self._holding.touched
        own = used
        if not (used and self._complete):
            used, own, _ = agreed.wait()
        self._holding.finish(used)
        for ties in self._ties:
            ties.meet(own)
        told.check(self.index)
        self._check_trained()
        if not used:
            raise TaskError(
                f"no parameter got a gradient from the loss of step {self.index}: look for detach(), .data, item() or "
                "no_grad() between the model's output and the loss, and for a loss that does not use the output"
            )
        if self._observer is not None:
            names = [name for name in self._trained if name in used]
            self._observer.gradients(
                self.index, self._spread.assembled(self._holding.full_gradients(), self._portion, names)
            )
        if self._statistics is not None:  # before the update: nobody is to wait for another's
            self._statistics.start(len(microbatches))
        updating, waiting = self._world.now(), self._spread.waited_seconds
        norm, skipped = self._update()
        optimizer_seconds = self._world.now() - updating - (self._spread.waited_seconds - waiting)
        self._updated = optimizer_seconds if updates_alone(self.plan) else 0.0
        self._holding.after_update()
        if self._statistics is not None:
            self._statistics.finish()
        _, _, (computed, updated) = agreed.wait()
        self._expectation.weight = told.weight
        self._runner.parts.dealer.learn(*self._spread.by_replica(computed, told.counts, updated))
        report = self._report(
            microbatches,
            told,
            seconds=time.perf_counter() - start,
            waited=self._spread.waited_seconds - waited,
            staged=self._spread.stages.waited_seconds - staged,
            optimizer_seconds=optimizer_seconds,
            computed=computed,
            updated=updated,
            norm=norm,
            skipped=skipped,
            sent=traffic.sent_bytes - sent,
        )
        self.index += 1
        return report

    def request_stop(self) -> None:
        """Make every worker's next report say ``stop``."""
        self._exchange.stop = True

    def observe(self, observer: Observer | None) -> None:
        """Set who looks at gradients; call on every worker alike."""
        self._observer = observer
        if self._runner.parts.sending is not None:
            self._runner.parts.sending.is_observed = observer is not None

    @property
    def state_owner(self) -> int:
        """The worker whose ``state`` this worker loads: itself, or the first of those that hold the same."""
        own = self._holding.sharded or self._holding.distinct or self.plan.by_parts
        return self.rank if own else self._spread.replicas.ranks[0]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a later run needs to go on: tensors (none where another worker owns them), and JSON-able values.

        The tensors are the live ones, which the next step changes: write or clone them before. The values are a
        snapshot. Raises TaskError for an optimizer or scheduler that keeps what no checkpoint can hold.
        """
        tensors, optimizer = named_state(self._holding.optimizer, self._holding.optimizer_names())
        named = {f"parameter/{name}": value for name, value in self._holding.kept().items()}
        named |= {f"buffer/{name}": value for name, value in self.model.named_buffers()}
        named |= {f"optimizer/{name}": value for name, value in tensors.items()}
        named |= {f"meeting/{name}": value for name, value in self._holding.extra().items()}
        values = {
            "index": self.index,
            "expected_weight": self._expectation.weight,
            "cuts": self._portion.cuts,
            "loss_scale": self._scale.value,
            "good_steps": self._scale.good_steps,
            "optimizer": optimizer,
            "scheduler": None,
        }
        if self._scheduler is not None:
            values["scheduler"] = encoded(self._scheduler.state_dict(), type(self._scheduler).__name__)
        return (named if self.state_owner == self.rank else {}), values

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on where ``state`` of this worker's ``state_owner`` stood, before or behind; collective.

        What is given is copied, and may be loaded again. Raises RunError where it is cut otherwise.
        """
        check_cuts(values.get("cuts", {}), self._portion.cuts)  # it was not kept always
        with torch.no_grad():
            for name, value in self._holding.kept().items():
                value.copy_(checked(name, tensors[f"parameter/{name}"], value.numel()))
            self._holding.reread()
            for name, value in self.model.named_buffers():
                value.copy_(tensors[f"buffer/{name}"])
            for name, value in self._holding.extra().items():
                value.copy_(tensors[f"meeting/{name}"])
        saved = {
            name.removeprefix("optimizer/"): value for name, value in tensors.items() if name.startswith("optimizer/")
        }
        if self._scheduler is not None:
            self._scheduler.load_state_dict(decoded(values["scheduler"]))
        load_named_state(self._holding.optimizer, self._holding.optimizer_names(), saved, values["optimizer"])
        self.index = values["index"]
        self._expectation.weight = values["expected_weight"]
        self._scale.value, self._scale.good_steps = values["loss_scale"], values["good_steps"]
        self._holding.loaded()

    def relaid(self, saved: str, read: Callable[[int], State]) -> State | None:
        """What to ``load`` of a checkpoint of the plan ``saved``, of which ``read`` gives each worker's part.

        None where the plans differ in more than how ZeRO cuts its shards, and where the optimizer steps.
        """
        if keeps_the_same(self.plan, saved):
            return read(self.state_owner)
        return resharded(self.plan, saved, self._holding, read)

    def full_state(self) -> dict[str, Tensor]:
        """Whole weights and persistent buffers on worker 0, for ``load_state_dict`` (collective; {} elsewhere).

        Names are those of the model's ``state_dict``: what is shared stands under each of its names, as one tensor.
        Extra state (``get_extra_state``) is left out.
        """
        whole = self._spread.assembled(
            self._holding.full_parameters(), self._portion, list(self._portion.blueprint.parameters)
        )
        return self._named(whole) if self.gives_whole else {}

    def _named(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole parameters by canonical name, and this worker's persistent buffers, by the names of a state_dict."""
        first = {id(parameter): name for name, parameter in self.model.named_parameters()}
        named: dict[str, Tensor] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            parameters = {
                key: whole[first[id(value)]] for key, value in module._parameters.items() if value is not None
            }
            buffers = {
                key: value
                for key, value in module._buffers.items()
                if value is not None and key not in module._non_persistent_buffers_set
            }
            named |= {prefix + key: value for key, value in (parameters | buffers).items()}
        return named

    def close(self) -> None:
        """Detach from the model, and give back what workers share; call it on every worker."""
        self._runner.close()
        self._runner.parts.streams.close()
        self._holding.close()
        self._spread.close()

    def _agree(self) -> Agreement:
        alone = self._holding.meets_weights  # each replica, with gradients of its own
        return Agreement(
            *(self._world, self._trained, self._holding.touched, (self._runner.compute_seconds, self._updated)),
            rows=self._spread.mesh.dp if alone else 1,
            row=self._spread.place.dp if alone else 0,
        )

    @property
    def _complete(self) -> bool:
        """Whether this worker has its gradients without the others, as a stage of a lone pipeline that shares none."""
        lone = self.plan.pp > 1 and self.plan.alike == 1 and not self.plan.server
        return lone and not self._ties and self._observer is None

    def _check_trained(self) -> None:
        changed = sorted(set(self._names()) ^ set(self._trained))
        if changed:
            raise PlanError(
                f"requires_grad of {changed[0]} ({len(changed)} parameters in all) changed after the step was built, "
                "which its workers and optimizer cannot follow: build the step again"
            )

    def _names(self) -> tuple[str, ...]:
        return tuple(name for name, value in self.model.named_parameters() if value.requires_grad)

    def _update(self) -> tuple[float | None, bool]:
        norm: float | None = None
        if self.task.clip is not None or self._scale.dynamic:
            total = self._norm()
            told = self._mean(total) if self._holding.meets_weights else total
            norm, overflowed = float(told), not bool(told.isfinite())
            if overflowed and not self._scale.dynamic:
                advice = "The loss is a number but its gradient is not: look for sqrt or log at zero, or 0/0."
                raise NonFiniteLoss(self.index, 0, norm, advice)
            self._scale.update(overflowed=overflowed)
            if overflowed:
                return norm, True
            if self.task.clip is not None:  # in the gradients' precision, as torch.nn.utils.clip_grad_norm_ does
                coefficient = (self.task.clip / (total + 1e-6)).clamp(max=1.0)
                self._holding.scale(float(coefficient))
        self._holding.update()
        if isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step(self._exchange.told().loss)
        elif self._scheduler is not None:
            self._scheduler.step()
        return norm, False

    def _norm(self) -> Tensor:
        held = self._holding.held()
        dtype = next((gradient.dtype for gradient in held.values()), torch.get_default_dtype())
        own = self._holding.meets_weights  # that of this worker's replica
        if not self._spread.alone:
            held = {name: gradient for name, gradient in held.items() if self._counts(name, own=own)}
        gradients = list(held.values())
        norm = torch.nn.utils.get_total_norm(gradients).detach() if gradients else torch.zeros((), dtype=dtype)
        if not self._holding.sharded and self._spread.alone:
            return norm
        among = self._spread.replica if own else self._world
        square = among.summed(norm.to("cpu", torch.float64).reshape(1) ** 2, "gradient norm")
        return square.sqrt()[0].to(norm.dtype)

    def _mean(self, norm: Tensor) -> Tensor:
        """Of norms of which each worker has its own: so that all find alike whether one is no number."""
        given = norm.to("cpu", torch.float64, copy=True).reshape(1)  # it is summed in place
        return self._world.summed(given, "gradient norms")[0] / self.workers

    def _counts(self, name: str, *, own: bool) -> bool:
        """Whether this worker's part of a gradient adds to the norm: of those that hold it alike, one does.

        ``own``: to that of its replica, whose gradients are its own.
        """
        sliced = name in self._portion.slices
        if own:
            return self._portion.counts(name) and (sliced or self._spread.leads)
        return self._portion.counts(name) and self._spread.speaks(sliced=sliced, sharded=self._holding.sharded)

    def _report(
        self,
        microbatches: tuple[Microbatch, ...],
        told: Told,
        *,
        seconds: float,
        waited: float,
        staged: float,
        optimizer_seconds: float,
        computed: list[float],
        updated: list[float],
        norm: float | None,
        skipped: bool,
        sent: float,
    ) -> StepReport:
        busy = [sum(one) for one in zip(computed, updated, strict=True)]
        idle = min(max(staged, max(busy) - busy[self.rank]), waited)
        terms = {
            "compute": self._runner.compute_seconds,
            "wait": idle,
            "communicate": waited - idle,
            "optimizer": optimizer_seconds,
        }
        terms["host"] = max(0.0, seconds - sum(terms.values()))
        return StepReport(
            step=self.index,
            loss=told.loss,
            weight=told.weight,
            samples=sum(len(microbatch.samples) for microbatch in microbatches),
            seconds=seconds,
            terms=terms,
            gradient_norm=norm if self.task.clip is not None else None,
            learning_rate=learning_rate(self._holding.optimizer),
            memory_bytes=memory_bytes(self._world.device),
            microbatches=self._spread.shared(told.counts),
            computed=tuple(computed),
            skipped=skipped,
            stop=told.stop,
            sent_bytes=sent,
        )
