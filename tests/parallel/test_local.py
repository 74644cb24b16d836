"""Local steps: against workers played one after another in plain PyTorch, each with a model of its own."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned, ragged_gpt
from torch import nn
from torch.utils.data import default_collate

import sheaf
from sheaf.errors import PlanError
from sheaf.parallel import refuse
from sheaf.plans import Plan
from sheaf.plans.layout import apportion
from sheaf.task import Loss, Order, Streams, key
from sheaf.task.blueprint import Blueprint

STEPS = 7


def sgd_mlp():
    return replace(mlp_float64(), optimizer=partial(torch.optim.SGD, lr=0.05), clip=None, scheduler=None)


def adam_mlp():
    return replace(mlp_float64(), optimizer=partial(torch.optim.AdamW, lr=0.01), clip=None, scheduler=None)


def clipped_mlp():
    return replace(mlp_float64(), optimizer=partial(torch.optim.SGD, lr=0.5), clip=0.1, scheduler=None)


def padded_mlp():
    """In some of its steps all that one of two workers has is padding; AdamW would move weights all the same."""
    data = [
        (inputs, label if index % 5 < 3 else torch.tensor(-100))
        for index, (inputs, label) in enumerate(adam_mlp().data)
    ]

    def loss(output, batch):
        total = nn.functional.cross_entropy(output, batch[1], reduction="sum", ignore_index=-100)
        return Loss(total, (batch[1] >= 0).sum())

    return replace(adam_mlp(), data=data, loss=loss, batch=4, microbatch=2)


class Played:
    """Workers of a dp plan, one after another: inner steps alone, ``meet(models, weights)`` when it says so."""

    def __init__(self, task, shares, *, total_weight=False):
        self.total_weight = total_weight  # gradients are divided by a worker's part of all weight, not by its own
        first = Blueprint(task).fill(torch.device("cpu"))
        self.task, self.shares = task, shares
        self.models = [copy.deepcopy(first) for _ in shares]
        self.optimizers = [task.optimizer(list(model.parameters())) for model in self.models]
        self.streams = [Streams(model, task.seed, torch.device("cpu")) for model in self.models]
        self.order = Order(len(task.data), task.batch, task.microbatch, task.seed, shuffle=task.shuffle)
        self.seen = [0.0] * len(shares)

    def step(self, index):
        total = weight = 0.0
        microbatches = list(self.order.step(index))
        counts = apportion(len(microbatches), self.shares)
        for worker, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            mine = microbatches[sum(counts[:worker]) : sum(counts[: worker + 1])]
            model.zero_grad()
            own = 0.0
            for microbatch in mine:
                torch.manual_seed(key(self.task.seed, "data", index, microbatch.index))
                batch = (self.task.collate or default_collate)([self.task.data[i] for i in microbatch.samples])
                batch = [item.double() if item.is_floating_point() else item for item in batch]
                self.streams[worker].enter(index, microbatch.index)
                loss = self.task.loss(model(batch[0]), batch)
                if not isinstance(loss, Loss):
                    loss = Loss(loss * len(microbatch.samples), len(microbatch.samples))
                loss.sum.backward()
                total, own = total + float(loss.sum.detach()), own + float(loss.weight)
            if own:
                whole = sum(len(microbatch.samples) for microbatch in microbatches)
                for parameter in model.parameters():
                    parameter.grad /= whole / len(self.shares) if self.total_weight else own
                if self.task.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), self.task.clip)
                optimizer.step()
            weight += own
            self.seen[worker] += own
        return total / weight

    def weights(self, worker):
        return nn.utils.parameters_to_vector(self.models[worker].parameters()).detach()

    def mean(self):
        total = sum(self.seen)
        return sum(seen / total * self.weights(worker) for worker, seen in enumerate(self.seen))

    def put(self, worker, vector):
        nn.utils.vector_to_parameters(vector.clone(), self.models[worker].parameters())


def run(task, text, steps=STEPS, resume_after=None):
    """This worker's losses and weights after each step, and the whole state at the end."""
    step = sheaf.build(task, Plan.parse(text))
    losses, weights = [], []
    for index in range(steps):
        losses.append(step().loss)
        weights.append(nn.utils.parameters_to_vector(step.model.parameters()).detach().clone())
        if index + 1 == resume_after:
            tensors, values = step.state()
            tensors = {name: value.clone() for name, value in tensors.items()}
            step.close()
            step = sheaf.build(task, Plan.parse(text))
            step.load(tensors, values)
    state = step.full_state()
    step.close()
    return losses, weights, state


@pytest.mark.parametrize(("plan", "make"), [("dp=2", sgd_mlp), ("dp=3,shares=3:1:2", sgd_mlp), ("dp=2", ragged_gpt)])
def test_with_one_step_between_meetings_and_plain_sgd_it_is_the_serial_answer(ranks, plan, make):
    task = replace(make(), optimizer=partial(torch.optim.SGD, lr=0.05), clip=None, scheduler=None)
    found = ranks(planned, int(plan[3]), task, plan + ",local=1", 4)[0]
    assert_same(found, plain(task, 4), 1e-12 if make is sgd_mlp else 2e-5)


@pytest.mark.parametrize(
    ("shares", "text", "make"),
    [
        ((1, 1), "dp=2", clipped_mlp),
        ((2, 1, 1), "dp=3,shares=2:1:1", adam_mlp),
        ((1, 1), "dp=2", padded_mlp),
    ],
)
def test_weights_meet_as_a_mean_every_few_steps(ranks, shares, text, make):
    found = ranks(run, len(shares), make(), text + ",local=3")
    played = Played(make(), shares)
    for step in range(STEPS):
        loss = played.step(step)
        if (step + 1) % 3 == 0:
            mean = played.mean()
            for worker in range(len(shares)):
                played.put(worker, mean)
            played.seen = [0.0] * len(shares)
        for worker in range(len(shares)):
            assert found[worker][0][step] == pytest.approx(loss, rel=1e-12)
            torch.testing.assert_close(found[worker][1][step], played.weights(worker), rtol=1e-12, atol=1e-12)
    whole = nn.utils.parameters_to_vector(found[0][2][name] for name, _ in played.models[0].named_parameters())
    torch.testing.assert_close(whole, played.mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["slowmo", "diloco"])
def test_outer_optimizers_are_those_of_torch(ranks, kind):
    found = ranks(run, 2, adam_mlp(), f"dp=2,local=2:{kind}:lr=0.6:momentum=0.8")
    played = Played(adam_mlp(), (1, 1))
    anchor = nn.Parameter(played.weights(0))
    outer = torch.optim.SGD([anchor], lr=0.6, momentum=0.8, nesterov=kind == "diloco")
    for step in range(STEPS):
        played.step(step)
        if (step + 1) % 2 == 0:
            anchor.grad = anchor.detach() - played.mean()
            outer.step()
            for worker in range(2):
                played.put(worker, anchor.detach())
            played.seen = [0.0, 0.0]
        for worker in range(2):
            torch.testing.assert_close(found[worker][1][step], played.weights(worker), rtol=1e-11, atol=1e-12)


def test_after_a_first_phase_of_meeting_gradients(ranks):
    found = ranks(run, 2, sgd_mlp(), "dp=2,local=2:after=3")
    serial = plain(sgd_mlp(), 3)
    for step in range(3):
        weights = nn.utils.parameters_to_vector(serial.weights[step].values())
        torch.testing.assert_close(found[1][1][step], weights, rtol=1e-12, atol=1e-12)
    assert (found[0][1][3] - found[1][1][3]).abs().max() > 1e-6, "the fourth step is each worker's own"
    assert torch.equal(found[0][1][4], found[1][1][4])


def test_fragments_meet_in_turn_and_travel_while_workers_go_on(ranks):
    found = ranks(run, 2, adam_mlp(), "dp=2,local=4:diloco:fragments=2:overlap=1", steps=9)
    played = Played(adam_mlp(), (1, 1))
    first_layer = sum(value.numel() for value in played.models[0][0].parameters())
    of_first = torch.arange(played.weights(0).numel()) < first_layer  # the first fragment: half of all numbers
    anchor, velocity = played.weights(0), torch.zeros(of_first.numel(), dtype=torch.float64)
    seen, travelling = {True: [0.0, 0.0], False: [0.0, 0.0]}, {}
    for done in range(1, 10):
        played.step(done - 1)
        for first, offset in ((True, 0), (False, 2)):
            seen[first] = [old + new for old, new in zip(seen[first], played.seen, strict=True)]
            mine = of_first == first
            if done % 4 == offset:
                total = sum(seen[first])
                mean = sum(weight / total * played.weights(worker) for worker, weight in enumerate(seen[first]))
                travelling[first], seen[first] = (anchor - mean)[mine], [0.0, 0.0]
            elif done % 4 == offset + 1 and first in travelling:  # a step later; what was found meanwhile stays by half
                velocity[mine] = 0.9 * velocity[mine] + travelling[first]
                anchor[mine] -= 0.7 * (travelling[first] + 0.9 * velocity[mine])
                for worker in range(2):
                    weights = played.weights(worker)
                    weights[mine] = (weights[mine] + anchor[mine]) / 2
                    played.put(worker, weights)
        played.seen = [0.0, 0.0]
        for worker in range(2):
            torch.testing.assert_close(found[worker][1][done - 1], played.weights(worker), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    ["local=3", "local=3:diloco", "local=4:diloco:fragments=2:overlap=2", "compress=int8", "compress=powersgd:2",
     "local=2:slowmo,compress=topk:0.2"],
)  # fmt: skip
def test_a_run_that_stops_and_goes_on_is_the_same_run(ranks, settings):
    whole = ranks(run, 2, adam_mlp(), "dp=2," + settings)
    resumed = ranks(run, 2, adam_mlp(), "dp=2," + settings, resume_after=4)
    for one, other in zip(whole, resumed, strict=True):
        assert one[0] == other[0]
        assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8", "topk:0.1", "powersgd:2"])
def test_compressed_training_stays_near_and_alike_on_all_workers(ranks, kind):
    found = ranks(run, 3, sgd_mlp(), f"dp=3,compress={kind}", steps=12)
    serial = plain(sgd_mlp(), 12)
    for worker in range(1, 3):
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[worker][1], strict=True))
    weights = nn.utils.parameters_to_vector(serial.weights[-1].values())
    moved = (weights - nn.utils.parameters_to_vector(serial.weights[0].values())).norm()
    off = float((found[0][1][-1] - weights).norm() / moved)
    assert 0 < off < {"bf16": 0.01, "fp16": 0.002, "int8": 0.02}.get(kind, 0.9), off


def test_scaled_precision_is_refused():
    with pytest.raises(PlanError, match="fp16"):
        refuse(replace(adam_mlp(), precision="fp16"), Plan.parse("dp=2,local=4"))
