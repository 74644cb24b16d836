"""A model built without memory has the values of (seed, name), the structure of a real one, and fits a weights file."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sheaf import Task
from sheaf.errors import TaskError
from sheaf.task.blueprint import Blueprint

CPU = torch.device("cpu")


def task(model, **changes) -> Task:
    return Task(
        model=model, loss=lambda output, batch: output.mean(), optimizer=torch.optim.AdamW, data=[1], batch=1, **changes
    )


class Rich(nn.Module):
    """Every way that a constructor makes tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16)
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.drawn = nn.Parameter(torch.randn(500) * 0.02)
        self.register_buffer("places", torch.arange(4.0).pow(2))
        self.register_buffer("hidden", torch.ones(3), persistent=False)
        self.plain, self.nested = torch.full((2,), 3.0), {"a": [torch.eye(2)]}
        self.rate = torch.linspace(0, 1, 3)[1].item()
        self.lstm = nn.LSTM(4, 5)
        self.norm = nn.BatchNorm1d(3)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
        self.from_numpy = nn.Parameter(torch.from_numpy(np.random.rand(5)))
        nn.init.orthogonal_(self.linear.weight)
        with torch.no_grad():
            self.linear.bias[:4] = 7.0
            self.linear.bias[4:].normal_()
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))


def test_filling_gives_a_model_like_a_real_one():
    blueprint = Blueprint(task(Rich))
    assert blueprint.whole is None
    model = blueprint.fill(CPU)
    real = Rich()
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in real.named_parameters()
    }
    assert model.head.weight is model.embedding.weight
    assert model.lstm._flat_weights[0] is model.lstm.weight_ih_l0
    assert torch.equal(model.places, torch.tensor([0.0, 1.0, 4.0, 9.0]))
    assert torch.equal(model.plain, torch.full((2,), 3.0))
    assert torch.equal(model.nested["a"][0], torch.eye(2))
    assert model.rate == 0.5
    assert torch.allclose(model.linear.weight.T @ model.linear.weight, torch.eye(8), atol=1e-5)
    assert torch.equal(model.linear.bias[:4], torch.full((4,), 7.0))
    assert 0.015 < float(model.drawn.detach().std()) < 0.025
    assert list(model.state_dict()) == list(real.state_dict())
    assert all(type(value) is nn.Parameter for value in model.parameters())
    model.lstm(torch.zeros(2, 1, 4))
    assert model.spectral(torch.ones(2, 4)).isfinite().all()


def test_a_value_depends_on_seed_and_name_only():
    def narrow() -> nn.Module:
        return nn.ModuleDict({"b": nn.Linear(8, 16)})

    def wide() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(8, 16)})

    first, second = Blueprint(task(narrow)), Blueprint(task(wide))
    torch.rand(10)
    assert torch.equal(first.value("b.weight"), second.value("b.weight"))
    assert torch.equal(first.value("b.weight"), first.value("b.weight"))
    assert not torch.equal(first.value("b.weight"), Blueprint(task(narrow, seed=1)).value("b.weight"))
    bound = 1 / math.sqrt(8)
    assert 0.9 * bound < float(first.value("b.weight").abs().max()) <= bound


def test_clones_start_equal_as_in_plain_torch():
    layers = Blueprint(task(Rich)).fill(CPU).layers.layers
    assert torch.equal(layers[0].linear1.weight, layers[1].linear1.weight)


def test_building_draws_nothing_from_the_caller():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    Blueprint(task(Rich)).fill(CPU)
    assert torch.equal(torch.rand(2), wanted)


def test_nothing_is_allocated_for_a_model_that_no_machine_holds():
    blueprint = Blueprint(task(lambda: nn.Sequential(*(nn.Linear(65536, 65536, bias=False) for _ in range(40)))))
    assert blueprint.whole is None
    assert sum(fake.numel() for fake in blueprint.parameters.values()) == 40 * 2**32


def test_a_constructor_that_needs_real_values_is_built_whole_and_says_why():
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.order = torch.from_numpy(self.linear.weight.detach().numpy().copy())

    blueprint = Blueprint(task(Stubborn))
    assert blueprint.whole is not None
    model = blueprint.fill(CPU)
    assert torch.equal(model.order, model.linear.weight)
    assert torch.equal(Blueprint(task(Stubborn)).fill(CPU).linear.weight, model.linear.weight)


def test_float64_holds_the_same_values_in_more_digits():
    single, double = Blueprint(task(Rich)), Blueprint(task(Rich, precision="fp64"))
    assert torch.equal(double.value("linear.weight"), single.value("linear.weight").double())
    model = double.fill(CPU)
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    assert model.norm.running_mean.dtype == torch.float64


def test_memory_shared_behind_torchs_back_is_refused():
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.b.weight = nn.Parameter(self.a.weight.data)

    with pytest.raises(TaskError, match="parameters a.weight and b.weight are different objects over the same memory"):
        Blueprint(task(Alias))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: 3, "model() returned a int; it must return a torch.nn.Module"),
        (lambda: nn.Linear(2, "3"), "building the model raised"),
    ],
)
def test_a_builder_that_builds_no_model(model, message):
    with pytest.raises(TaskError) as caught:
        Blueprint(task(model))
    assert message in str(caught.value)


def pair() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_a_weights_file_gives_the_values(tmp_path):
    weights = {
        "0.weight": torch.ones(2, 3),
        "0.bias": torch.zeros(2),
        "1.weight": torch.ones(2),
        "1.bias": torch.ones(2),
    }
    save_file(weights, tmp_path / "start.safetensors")
    model = Blueprint(task(pair, weights=tmp_path / "start.safetensors")).fill(CPU)
    for name, value in weights.items():
        assert torch.equal(model.get_parameter(name), value)
    assert torch.equal(model[1].running_var, torch.ones(2))


def test_a_weights_file_that_does_not_fit_tells_everything(tmp_path):
    wrong: dict[str, Tensor] = {"0.weight": torch.ones(3, 3), "0.bias": torch.zeros(2), "2.weight": torch.ones(2)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(TaskError) as caught:
        Blueprint(task(pair, weights=tmp_path / "wrong.safetensors"))
    assert set(caught.value.broken) == {
        "weights hold no 1.weight, a parameter of the model",
        "weights hold no 1.bias, a parameter of the model",
        "weights hold 2.weight, which the model does not have",
        "weights hold 0.weight with shape (3, 3); the model wants (2, 3)",
    }
    (tmp_path / "text").write_text("no")
    with pytest.raises(TaskError, match="is not a safetensors file"):
        Blueprint(task(pair, weights=tmp_path / "text"))
