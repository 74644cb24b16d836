"""The zoo's larger tasks learn what they should, and every model's small task computes, quickly and reproducibly."""

import re

import pytest
import torch
from small import SMALL

from sheaf.errors import TaskError
from sheaf.task import Order, arguments, as_loss, fetch
from sheaf.zoo.tasks import bert_text, masked, number_words, spheres, translation, vgg_digits, volumes


@pytest.fixture(autouse=True)
def one_thread():
    """Small models on a busy machine: two threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parts_of_step(task, model, step):
    order = Order(task.num_samples, task.batch, task.microbatch, task.seed, shuffle=task.shuffle)
    for microbatch in order.step(step):
        batch = fetch(task, microbatch.samples, step)
        positional, named = arguments(task, batch)
        yield as_loss(task.loss(model(*positional, **named), batch), len(microbatch.samples))


def losses(task, steps, *, same=False):
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(list(model.parameters()))
    found = []
    for step in range(steps):
        parts = list(parts_of_step(task, model, 0 if same else step))
        loss = sum(part.sum for part in parts) / sum(float(part.weight) for part in parts)
        optimizer.zero_grad()
        loss.backward()
        if task.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("task", "steps", "below"),
    [
        (lambda: vgg_digits(batch=64, microbatch=64, dropout=0.0), 14, 0.9),
        (lambda: bert_text(width=32, layers=1, batch=16, microbatch=16, learning_rate=1e-2), 15, 0.75),
        (lambda: translation(width=32, layers=1, batch=32, microbatch=32, learning_rate=1e-2), 15, 0.8),
        (lambda: translation(recurrent=True, width=32, layers=1, microbatch=32, learning_rate=1e-2), 15, 0.85),
        (lambda: volumes(side=12, widths=(4, 8), batch=8, microbatch=8), 10, 0.8),
    ],
    ids=["vgg_digits", "bert_text", "translation", "recurrent", "volumes"],
)
def test_tasks_learn(task, steps, below):
    found = losses(task(), steps)
    assert sum(found[-3:]) / 3 < below * found[0], found


@pytest.mark.parametrize("name", SMALL)
def test_a_small_task_computes_a_gradient_for_everything_and_fits_a_batch(name):
    task = SMALL[name]()
    assert task.name == name
    torch.manual_seed(0)
    model = task.model()
    assert 3_000 < sum(parameter.numel() for parameter in model.parameters()) < 100_000
    for part in parts_of_step(task, model, 0):
        part.sum.backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []
    found = losses(task, 15, same=True)
    assert sum(found[-3:]) < 0.8 * sum(found[:3]), found


@pytest.mark.parametrize("name", SMALL)
def test_a_small_task_is_the_same_each_time(name):
    assert losses(SMALL[name](), 2) == losses(SMALL[name](), 2)


@pytest.mark.parametrize("name", [name for name in SMALL if name in {"gpt", "bert", "moe"} or "seq2seq" in name])
def test_small_texts_are_ragged(name):
    task = SMALL[name]()
    weights = {float(part.weight) for part in parts_of_step(task, task.model(), 0)}
    assert len(weights) > 1


def test_vgg_is_sized_by_its_arguments():
    task = vgg_digits(width=64, hidden=4096, side=224, microbatch=2)
    assert task.data[0][0].shape == (1, 224, 224)
    with torch.device("meta"):
        model = task.model()
    # one channel instead of three, ten classes instead of a thousand
    assert sum(parameter.numel() for parameter in model.parameters()) == 138_357_544 - 2 * 9 * 64 - 990 * 4097


def test_hidden_bytes_are_as_many_as_asked_and_are_hidden_as_bert_hides_them():
    paragraphs = [torch.randint(256, (400,)) for _ in range(40)] + [torch.randint(256, (300,))]
    whole = torch.nn.utils.rnn.pad_sequence(paragraphs, batch_first=True, padding_value=masked.PADDING)
    tokens, targets = masked.hidden(paragraphs, share=0.15)
    asked = targets != masked.NO_TARGET
    assert asked.sum().item() / 16_300 == pytest.approx(0.15, abs=0.02)
    assert torch.equal(targets[asked], whole[asked])
    assert torch.equal(tokens[~asked], whole[~asked])
    assert not asked[whole == masked.PADDING].any()
    told = tokens[asked]
    assert (told == masked.MASK).float().mean().item() == pytest.approx(0.8, abs=0.05)
    assert (told == whole[asked]).float().mean().item() == pytest.approx(0.1, abs=0.04)


def test_hidden_bytes_depend_on_the_stream_only():
    task = bert_text(text="some words follow others\n\n" * 40)
    once, again, other = (fetch(task, [1, 2, 3], stream) for stream in (5, 5, 6))
    assert torch.equal(once[0], again[0])
    assert not torch.equal(once[0], other[0])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (10, "ten"),
        (60, "sixty"),
        (99, "ninety nine"),
        (100, "one hundred"),
        (1_001, "one thousand and one"),
        (3_300, "three thousand three hundred"),
        (999_999, "nine hundred and ninety nine thousand nine hundred and ninety nine"),
    ],
)
def test_numbers_are_said_as_in_english(number, words):
    assert number_words.in_words(number) == words.split()


def test_every_number_is_said_once_and_otherwise_than_any_other():
    numbers = number_words.Numbers(count=2_000, most=2_000)
    pairs = [numbers[index] for index in range(len(numbers))]
    digits = {int("".join(number_words.WORDS[code] for code in target[1:-1])) for _, target in pairs}
    assert digits == set(range(2_000))
    assert len({tuple(source.tolist()) for source, _ in pairs}) == 2_000
    with pytest.raises(IndexError):
        numbers[2_000]


def test_a_translation_is_read_one_word_behind():
    task = translation(most=1_000)
    batch = fetch(task, [0, 1, 2, 3], 0)
    assert torch.equal(batch["target"][:, 1:], batch["wanted"][:, :-1])
    assert set(batch["target"][:, 0].tolist()) == {number_words.START}
    weight = float(task.loss(torch.zeros(*batch["wanted"].shape, len(number_words.WORDS)), batch).weight)
    assert weight == (batch["wanted"] != number_words.PADDING).sum()


def test_translation_refuses_what_it_cannot_write():
    with pytest.raises(TaskError, match=re.escape(f"there are {len(number_words.WORDS)} words")):
        translation(vocabulary=20)
    with pytest.raises(TaskError, match="1000000"):
        translation(most=2_000_000)


def test_volumes_are_the_same_each_time_and_few_slices_are_labelled():
    data = spheres.Spheres(count=4, side=16, slices=3)
    volume, labels = data[2]
    assert torch.equal(volume, data[2][0])
    assert not torch.equal(volume, data[3][0])
    assert (labels != spheres.UNLABELLED).flatten(1).any(1).sum() == 3
    whole = spheres.Spheres(count=4, side=16)[2][1]
    assert set(whole.unique().tolist()) == {spheres.NOTHING, spheres.SOLID, spheres.HOLLOW}
    assert volumes(slices=3).num_samples == 256
    with pytest.raises(IndexError):
        data[4]
