"""Every example holds a task that computes, and whose small change is all a user needs to make it their own."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sheaf.task import Order, arguments, as_loss, fetch

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "digits_mlp": "sklearn",
    "digits_resnet": "sklearn",
    "hf_gpt2": "transformers",
    "hf_bert": "transformers",
    "keras_functional": "keras",
}


def test_every_example_is_tried_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, "gpt_text", "demo", "gpt_175b"}


@pytest.mark.parametrize("name", [*NEEDS, "gpt_text"])
def test_an_example_computes_a_loss_and_its_gradient(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = module.task()
    torch.manual_seed(0)
    model = task.model()
    assert 1e3 < sum(parameter.numel() for parameter in model.parameters()) < 2e6
    first = Order(task.num_samples, task.batch, task.microbatch, task.seed, shuffle=True).step(0)[0]
    batch = fetch(task, first.samples, 0)
    positional, named = arguments(task, batch)
    loss = as_loss(task.loss(model(*positional, **named), batch), len(first.samples))
    loss.sum.backward()
    assert 0 < loss.sum.item() / float(loss.weight) < 8
    assert isinstance(task.optimizer(list(model.parameters())), torch.optim.Optimizer)
