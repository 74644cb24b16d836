"""The zoo's tasks read real data, lose on it what they should, and learn it."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheaf.errors import TaskError
from sheaf.task import Order, arguments, as_loss, fetch
from sheaf.zoo.tasks import digits, digits_mlp, digits_resnet, mlp_784, text, text_gpt


def losses(task, steps):
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(list(model.parameters()))
    order = Order(task.num_samples, task.batch, task.microbatch, task.seed, shuffle=task.shuffle)
    found = []
    for step in range(steps):
        parts = []
        for microbatch in order.step(step):
            batch = fetch(task, microbatch.samples, step)
            positional, named = arguments(task, batch)
            parts.append(as_loss(task.loss(model(*positional, **named), batch), len(microbatch.samples)))
        loss = sum(part.sum for part in parts) / sum(float(part.weight) for part in parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("task", "steps", "below"),
    [
        (lambda: digits_mlp(microbatch=100), 20, 0.6),
        (lambda: mlp_784(microbatch=100), 20, 0.6),
        (lambda: digits_resnet(batch=32, microbatch=32), 10, 0.5),
        (lambda: text_gpt(width=32, layers=1, heads=2, batch=8, learning_rate=1e-2), 15, 0.75),
        (lambda: text_gpt(ragged=True, width=32, layers=1, heads=2, batch=8, learning_rate=1e-2), 15, 0.75),
    ],
    ids=["digits_mlp", "mlp_784", "digits_resnet", "text_gpt", "ragged"],
)
def test_tasks_learn(task, steps, below):
    found = losses(task(), steps)
    assert sum(found[-3:]) / 3 < below * found[0], found


def test_text_is_long_and_the_same_each_time():
    assert len(text.reference_text()) > 100_000
    assert "assert" in text.reference_text()


@given(content=st.text(min_size=20), context=st.integers(1, 8))
def test_windows_follow_each_other_and_targets_follow_them(content, context):
    windows = text.Windows(content, context)
    whole = content.encode()
    joined = b"".join(bytes(windows[i][0].tolist()) for i in range(len(windows)))
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) <= context
    for tokens, targets in (windows[i] for i in range(len(windows))):
        assert torch.equal(tokens[1:], targets[:-1])


def test_windows_have_an_end():
    windows = text.Windows("0123456789", 4)
    assert len(list(windows)) == len(windows) == 2
    with pytest.raises(IndexError):
        windows[2]


def test_paragraphs_differ_in_length_and_fit_the_model():
    paragraphs = text.Paragraphs(text.reference_text(), context=64)
    lengths = {len(paragraphs[i]) for i in range(len(paragraphs))}
    assert len(lengths) > 20
    assert max(lengths) == 65
    assert min(lengths) >= 2


def test_padding_weighs_nothing():
    task = text_gpt(ragged=True, width=16, layers=1, heads=2, dropout=0.0)
    torch.manual_seed(0)
    model = task.model()
    items = [task.data[0][:20], task.data[1][:9]]
    together = text.padded(items)
    loss = task.loss(model(together[0]), together)
    alone = [text.padded([item]) for item in items]
    apart = [task.loss(model(batch[0]), batch) for batch in alone]
    assert float(loss.weight) == 19 + 8 == sum(float(each.weight) for each in apart)
    torch.testing.assert_close(loss.sum, apart[0].sum + apart[1].sum)


def test_digits_leave_a_last_batch_that_does_not_divide():
    task = digits_mlp()
    assert task.num_samples == 1797
    assert task.num_samples % task.batch
    images, labels = digits.images_and_labels()
    assert (images.min(), images.max()) == (0, 1)
    assert labels.bincount().min() > 170


def test_enlarged_digits_keep_their_ink():
    images, _ = digits.images_and_labels()
    large = digits.enlarged(images[:50], 28)
    assert large.shape == (50, 1, 28, 28)
    assert large.mean().item() == pytest.approx(images[:50].mean().item(), rel=0.02)


def test_overrides_reach_the_task():
    task = text_gpt(seed=5, batch=6, microbatch=3, clip=1.0, precision="bf16", text="some words " * 100)
    assert (task.seed, task.batch, task.microbatch, task.clip, task.precision) == (5, 6, 3, 1.0, "bf16")
    assert digits_resnet(side=16).data[0][0].shape == (1, 16, 16)
    with pytest.raises(TaskError, match="larger than batch"):
        digits_mlp(microbatch=500)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    digits.images_and_labels.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TaskError, match=r'pip install "sheaf\[zoo\]"'):
        digits_mlp()
