"""A Keras 3 model on its torch backend, as it is, under any plan: the same answer as plain PyTorch."""

import os
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec

import pytest
import torch
from plain import Run, assert_same, plain, planned
from torch import nn
from torch.nn import functional as F

from pool import RankRaised
from sheaf import Task
from sheaf.errors import PlanError, TaskError
from sheaf.graph import cut
from sheaf.parallel import with_microbatch
from sheaf.plans import Plan
from sheaf.task import Blueprint

os.environ.setdefault("KERAS_BACKEND", "torch")
# Each process that collects tests would import it, for a second and a half.
pytestmark = pytest.mark.skipif(find_spec("keras") is None, reason="keras is not there")

STEPS = 2


def branches(*, seed: int | None = None) -> nn.Module:
    """Two branches, a skip, BatchNormalization, dropout, an operation that is no layer."""
    import keras
    from keras import layers

    image = keras.Input((8, 8, 2))
    first = layers.Conv2D(5, 3, padding="same")(image)
    first = layers.ReLU()(layers.BatchNormalization()(first))
    second = layers.Conv2D(5, 3, padding="same", activation="relu")(first)
    flat = layers.Flatten()(layers.MaxPooling2D()(layers.Add()([first, second])))
    one = layers.Dropout(0.3, seed=seed)(layers.Dense(13, activation="relu")(flat))
    both = layers.Concatenate()([one, layers.Dense(9, activation="gelu", name="wide")(flat)]) * 2.0
    return keras.Model(image, layers.Dense(5)(both))


def task(**changes) -> Task:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(14, 8, 8, 2, generator=generator), torch.randint(5, (14,), generator=generator)
    made = Task(
        model=branches,
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        data=list(zip(images, labels, strict=True)),
        inputs=lambda batch: {"inputs": batch[0], "training": True},
        batch=7,
        microbatch=2,
        seed=3,
    )
    return replace(made, **changes)


@cache
def reference() -> Run:
    return plain(task(), STEPS)


@pytest.mark.parametrize("plan", ["tp=2", "pp=2", "pp=2:zero-bubble,recompute=full", "dp=2,zero=3", "dp=2"])
def test_a_functional_model_is_the_same_under_any_plan(ranks, plan):
    found = ranks(planned, Plan.parse(plan).workers, task(), plan, STEPS)[0]
    assert_same(found, reference(), 1e-4)  # Keras computes in float32


def test_its_layers_are_blocks_with_parameters_and_buffers_of_their_own():
    blueprint, again = Blueprint(task()), Blueprint(task())
    names = ["conv2d.kernel", "conv2d.bias", "batch_normalization.gamma", "batch_normalization.beta"]
    assert list(blueprint.names)[:4] == names
    assert list(again.names) == list(blueprint.names)  # Keras itself goes on counting
    assert {"batch_normalization.moving_mean", "dropout.seed_generator_state"} <= set(blueprint.buffers)
    assert {"wide", "dense", "add", "conv2d_1"} <= set(cut(blueprint.model))
    assert blueprint.whole is None
    for name in (*blueprint.names, *blueprint.buffers):
        assert torch.equal(blueprint.value(name), again.value(name)), name


def test_it_computes_what_keras_computes_with_the_same_weights():
    ours, raw = Blueprint(task()).fill(torch.device("cpu")), branches()
    raw.set_weights([variable.value.detach().numpy() for variable in ours.weights])
    images = torch.randn(6, 8, 8, 2)
    assert torch.equal(ours(images, training=False), raw(images, training=False))
    ours.get_layer(index=1).kernel.assign(torch.zeros(3, 3, 2, 5))
    assert not dict(ours.named_parameters())["conv2d.kernel"].any()  # a variable and its parameter are one


def test_moving_statistics_are_those_of_keras_itself():
    model = branches()
    norm = next(layer for layer in model.layers if "batch_norm" in layer.name)
    filled = Blueprint(task()).fill(torch.device("cpu"))
    model.set_weights([variable.value.detach().numpy() for variable in filled.weights])
    alone = task(microbatch=7)
    run = plain(alone, 1)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(_order_key()))[:7]
    model(torch.stack([alone.data[index][0] for index in order.tolist()]), training=True)
    torch.testing.assert_close(run.buffers["batch_normalization.moving_variance"], norm.moving_variance.value.detach())


def _order_key() -> int:
    from sheaf.task import key

    return key(3, "order", 0)


def test_a_seed_of_a_layers_own_is_refused_among_several_workers(ranks):
    with pytest.raises(RankRaised) as caught:
        ranks(planned, 2, task(model=partial(branches, seed=7)), "dp=2", 1)
    assert isinstance(caught.value.exception, PlanError)
    assert "changes the buffer dropout.seed_generator_state" in str(caught.value.exception)


def test_a_microbatch_must_be_given_where_keras_draws_or_norms():
    with pytest.raises(PlanError, match=r"batch_normalization \(BatchNormalization\) makes the answer depend on it"):
        with_microbatch(task(microbatch=None), Plan())


def test_a_layer_without_variables_before_its_first_call_is_refused():
    def late() -> nn.Module:
        import keras

        return keras.Sequential([keras.layers.Dense(4)])

    with pytest.raises(TaskError, match=r"has no variables before its first call: give the shape in model\(\)"):
        Blueprint(task(model=late))


def test_a_sequential_model_and_one_inside_another():
    def nested() -> nn.Module:
        import keras
        from keras import layers

        inner = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.Dense(4)], name="inner")
        return keras.Sequential([keras.Input((6,)), inner, layers.Dense(5)])

    names = list(Blueprint(task(model=nested)).names)
    assert names == [
        *(f"inner.{layer}.{name}" for layer in ("dense", "dense_1") for name in ("kernel", "bias")),
        "dense.kernel",
        "dense.bias",
    ]
