"""The serial side against a loop written by hand here, and against nothing else."""

import pytest
import torch
from parity_fakes import words_task
from torch import nn

from sheaf.errors import NonFiniteLoss, RunError
from sheaf.parity.arithmetic import FLIPPED, ROLLED, Arithmetic
from sheaf.parity.observation import START, Observation, Prints, Store
from sheaf.parity.serial import train
from sheaf.task import Order, Streams, Task, key
from sheaf.task.blueprint import Blueprint

CPU = torch.device("cpu")


def test_is_what_a_hand_written_loop_computes():
    task = words_task(scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    model = Blueprint(task).fill(CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    streams = Streams(model, task.seed, CPU)
    order = Order(22, 10, 3, task.seed, shuffle=True)
    observed = train(task, 4, microbatch=3, device=CPU)
    assert next(observed).step == START
    rate, expected = 1e-3, 10
    for step in range(4):
        seen = next(observed)
        total = weight = 0.0
        for microbatch in order.step(step):
            words, targets = (
                torch.stack(parts) for parts in zip(*(task.data[i] for i in microbatch.samples), strict=True)
            )
            streams.enter(step, microbatch.index)
            logits = model(words)
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
            )
            (loss * (1 / expected)).backward()
            total, weight = total + loss.item(), weight + (targets != -1).sum().item()
            assert seen.losses[microbatch.index] == (loss.item(), (targets != -1).sum().item())
        for parameter in model.parameters():
            parameter.grad *= expected / weight
        expected = weight
        for name, parameter in model.named_parameters():
            assert torch.equal(seen.gradients[name], parameter.grad)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        rate /= 2
        assert seen.loss == pytest.approx(total / weight, rel=1e-12)
        assert seen.weights.keys() == dict(model.named_parameters()).keys()  # a shared one once
        assert all(torch.equal(seen.weights[name], value) for name, value in model.named_parameters())
        assert all(torch.equal(seen.buffers[name], value) for name, value in model.named_buffers())
    assert next(observed, None) is None


def test_last_batch_of_an_epoch_is_smaller():
    sizes = [len(seen.losses) for seen in train(words_task(), 4, microbatch=3, device=CPU)]
    assert sizes == [0, 4, 4, 1, 4]  # 22 samples: 10, 10, 2, then the next epoch


@pytest.mark.parametrize(
    "arithmetic",
    [
        Arithmetic(parts=2, late=True),
        Arithmetic(parts=3, kernels=ROLLED),
        Arithmetic(kernels=FLIPPED),
    ],
    ids=str,
)
def test_another_order_computes_the_same_in_float64(arithmetic):
    task = words_task(precision="fp64")
    for one, other in zip(
        train(task, 2, microbatch=3, device=CPU),
        train(task, 2, microbatch=3, device=CPU, arithmetic=arithmetic),
        strict=True,
    ):
        assert one.losses.keys() == other.losses.keys()
        for name, gradient in one.gradients.items():
            torch.testing.assert_close(other.gradients[name], gradient, rtol=1e-9, atol=1e-13)
        for name, buffer in one.buffers.items():
            torch.testing.assert_close(other.buffers[name], buffer, rtol=1e-12, atol=1e-14)
    assert any(not torch.equal(other.gradients[name], one.gradients[name]) for name in one.gradients)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.second, self.grouped = nn.Conv2d(6, 4, 3, bias=False), nn.Conv2d(4, 4, 1, groups=2)
        self.last = nn.Linear(4 * 16, 3)

    def forward(self, images):
        return self.last(self.grouped(self.second(self.norm(self.first(images)).relu())).flatten(1))


def images_task(**changes):
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(2, 8, 8, generator=generator, dtype=torch.float64), index % 3) for index in range(8)]
    values = {"batch": 8, "microbatch": 8, "precision": "fp64", "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    return Task(
        model=Images,
        loss=lambda out, batch: nn.functional.cross_entropy(out, batch[1]),
        data=data,
        **(values | changes),
    )


@pytest.mark.parametrize("kernels", [FLIPPED, ROLLED])
def test_kernels_in_another_order_compute_the_same_and_round_otherwise(kernels):
    (_, one), (_, other) = (
        list(train(images_task(), 1, microbatch=8, device=CPU, arithmetic=Arithmetic(kernels=way)))
        for way in ("as it is", kernels)
    )
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(other.gradients[name], gradient, rtol=1e-9, atol=1e-14)
    assert not torch.equal(one.gradients["first.weight"], other.gradients["first.weight"])  # one microbatch: not zero


def test_follow_starts_each_step_from_the_other_run():
    task = words_task()
    other = {seen.step: seen for seen in train(words_task(seed=6), 3, microbatch=3, device=CPU)}
    for seen in train(task, 3, microbatch=3, device=CPU, follow=other.__getitem__):
        if seen.step > 0:
            moved = (seen.weights["norm.bias"] - other[seen.step - 1].weights["norm.bias"]).norm().item()
            assert moved == pytest.approx(seen.moves["norm.bias"], rel=1e-5)
            assert torch.allclose(seen.weights["norm.bias"], other[seen.step].weights["norm.bias"], atol=1e-7)
            assert not torch.allclose(seen.gradients["norm.bias"], other[seen.step].gradients["norm.bias"])


def test_fp16_skips_overflowing_steps_as_pytorch_does():
    class Steep(nn.Linear):
        def forward(self, value):
            return super().forward(value)

    data = [(torch.full((4,), 4.0), torch.ones(1)) for _ in range(4)]
    task = Task(
        model=lambda: Steep(4, 1),
        loss=lambda out, batch: 100 * (out - batch[1]).square().mean(),
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-4),
        data=data, batch=4, microbatch=2, precision="fp16",
    )  # fmt: skip
    seen = list(train(task, 12, microbatch=2, device=CPU))[1:]
    assert seen[0].skipped
    assert not seen[0].gradients
    assert [each.skipped for each in seen] == sorted((each.skipped for each in seen), reverse=True)
    assert not seen[-1].skipped
    assert torch.equal(seen[0].weights["weight"], Blueprint(task).value("weight"))
    assert seen[-1].loss < seen[0].loss


def test_unused_parameter_has_no_gradient_and_an_unused_step_none():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.never = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, value):
            return self.used(value)

    data = [(torch.ones(2), torch.zeros(1))] * 4

    def loss(out, batch):
        return (out - batch[1]).square().mean()

    task = Task(model=Partly, loss=loss, optimizer=torch.optim.AdamW, data=data, batch=4)
    *_, seen = train(task, 1, microbatch=2, device=CPU)
    assert set(seen.gradients) == {"used.weight", "used.bias"}
    assert torch.equal(seen.weights["never.weight"], Blueprint(task).value("never.weight"))


def test_nan_names_step_and_microbatch():
    def loss(output, batch):
        return output.sum() / (0.0 if batch[1].max() == 5 else 1.0)

    data = [(torch.ones(2), torch.tensor(index)) for index in range(8)]
    task = Task(
        model=lambda: nn.Linear(2, 1),
        loss=loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        data=data,
        batch=4,
        shuffle=False,
    )
    with pytest.raises(NonFiniteLoss, match="microbatch 0 at step 1"):
        list(train(task, 2, microbatch=2, device=CPU))


def test_serial_does_not_import_the_executors(ranks):
    def imported():
        import importlib
        import sys

        kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "sheaf"}
        importlib.import_module("sheaf.parity.serial")
        found = [name for name in sys.modules if name.startswith("sheaf.")]
        for name in found:
            del sys.modules[name]
        sys.modules.update(kept)
        return found

    (found,) = ranks(imported, 1)
    assert "sheaf.parity.serial" in found
    assert not [name for name in found if name.startswith("sheaf.parallel")]


def test_observation_comes_back_from_its_file(tmp_path):
    store = Store(tmp_path)
    seen = Observation(
        step=3, loss=0.1, losses={0: (1.5, 2.0)}, prints={(0, "a.b", 1): (1.0, 2.0, 3.0)}, moves={"w": 0.25},
        gradients={"w": torch.ones(2, 2).T}, weights={"w": torch.eye(2), "b": torch.ones((), dtype=torch.bfloat16)},
        buffers={"n": torch.tensor(4)},
    )  # fmt: skip
    store.write(seen)
    back = store.read(3)
    assert (back.loss, back.losses, back.prints, back.moves) == (seen.loss, seen.losses, seen.prints, seen.moves)
    assert list(back.weights) == ["w", "b"]
    assert back.weights["b"].dtype == torch.bfloat16
    assert back.buffers["n"] == 4
    with pytest.raises(RunError, match="step 4"):
        store.read(4)


def test_prints_do_not_count_recomputed_forwards():
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    prints = Prints(model, lambda: 7)
    checkpoint(model, torch.ones(2, 3), use_reentrant=False).sum().backward()
    assert sorted(prints.take()) == [(7, "0", 0), (7, "1", 0)]
    assert key("x")
    assert prints.take() == {}
