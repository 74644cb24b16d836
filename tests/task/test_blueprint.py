"""A model built without memory has the values of (seed, name), the structure of a real one, and fits a weights file."""

import math
from collections import OrderedDict, defaultdict
from functools import partial
from typing import NamedTuple

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

    with pytest.raises(
        TaskError, match=r"parameters a\.weight and b\.weight are different objects over the same memory"
    ):
        Blueprint(task(Alias))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: 3, "model() returned int; it must return a torch.nn.Module"),
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


class Assigned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.zero, self.cast = (nn.Linear(50, 50, bias=False) for _ in range(3))
        self.scaled.weight.data = self.scaled.weight.data * 0.01
        self.zero.weight.data = torch.zeros(50, 50)
        self.cast.weight.data = self.cast.weight.data.double()


def test_assigning_data_is_recorded():
    blueprint = Blueprint(task(Assigned))
    assert blueprint.whole is None
    model = blueprint.fill(CPU)
    assert 0.0007 < float(model.scaled.weight.detach().std()) < 0.0009
    assert not model.zero.weight.any()
    assert model.cast.weight.dtype == torch.float64


def test_a_number_read_while_building_is_of_the_weights_own_draw():
    class Radius(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            drawn = torch.randn(40, 40)
            self.weight = nn.Parameter(drawn * (0.9 / torch.linalg.matrix_norm(drawn, 2).item()))

    blueprint = Blueprint(task(Radius))
    assert blueprint.whole is None
    assert float(torch.linalg.matrix_norm(blueprint.value("weight"), 2)) == pytest.approx(0.9, abs=1e-5)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        memory = np.zeros((2, 2), dtype=np.float32)
        for index, layer in enumerate(self.layers):
            memory[:] = index
            layer.weight.data.copy_(torch.from_numpy(memory))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        given = torch.from_numpy(np.ones(3, dtype=np.float32))
        given.mul_(5)
        self.copied, self.taken = nn.Parameter(given.clone()), nn.Parameter(given)


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        memory = np.zeros(3, dtype=np.float32)
        self.weight = nn.Parameter(torch.from_numpy(memory))
        memory[:] = 7


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        given = torch.FloatTensor([1, 2])
        given.mul_(2)
        self.weight = nn.Parameter(given)
        self.register_buffer("steps", torch.tensor([1.0, 2.0]).add_(1))


@pytest.mark.parametrize("model", [Reused, InPlace, Late, Listed])
def test_real_tensors_count_as_they_were_then(model):
    wanted = model()
    drawn = {"layers.0.bias", "layers.1.bias", "layers.2.bias"}
    blueprint = Blueprint(task(model))
    for _ in range(2):
        for name, value in wanted.state_dict().items():
            assert name in drawn or torch.equal(blueprint.value(name), value), name


TABLE = torch.arange(4.0).view(2, 2)


def test_a_model_never_shares_the_users_memory():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding.from_pretrained(TABLE, freeze=False)
            self.register_buffer("kept", TABLE)
            self.plain = TABLE

    blueprint = Blueprint(task(Table))
    model = blueprint.fill(CPU)
    for tensor in (model.table.weight.detach(), model.kept, model.plain, blueprint.value("kept")):
        tensor.fill_(9.0)
    assert torch.equal(TABLE, torch.arange(4.0).view(2, 2))
    assert torch.equal(Blueprint(task(Table)).fill(CPU).table.weight, TABLE)


def test_a_model_that_was_there_before_is_left_as_it_is():
    body = nn.Linear(2, 2)
    wanted = body.weight.detach().clone()
    for _ in range(2):
        model = Blueprint(task(lambda: nn.Sequential(body, nn.Linear(2, 2)))).fill(CPU)
        assert torch.equal(model[0].weight, wanted)
        model[0].weight.detach().zero_()
    assert type(body.weight) is nn.Parameter
    assert torch.equal(body.weight, wanted)


class Holder:
    def __init__(self, held: Tensor) -> None:
        self.held = held


class Pair(NamedTuple):
    held: Tensor
    number: int


class Keeping(nn.Module):
    """A tensor kept where ``keep`` puts it."""

    def __init__(self, keep) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.kept = keep(torch.arange(4.0))


@pytest.mark.parametrize(
    ("keep", "get", "whole"),
    [
        (Holder, lambda kept: kept.held, True),
        (lambda held: Pair(held, 1), lambda kept: kept.held, False),
        (lambda held: {held}, lambda kept: next(iter(kept)), False),
        (lambda held: OrderedDict(a=[held]), lambda kept: kept["a"][0], False),
        (lambda held: defaultdict(list, a=[held]), lambda kept: kept["a"][0], False),
        (lambda held: lambda: held, lambda kept: kept(), True),
        (lambda held: partial(torch.add, held), lambda kept: kept(0.0), True),
    ],
    ids=["object", "namedtuple", "set", "ordered", "defaultdict", "closure", "partial"],
)
def test_no_tensor_stays_fake_wherever_it_is_kept(keep, get, whole):
    blueprint = Blueprint(task(lambda: Keeping(keep)))
    assert (blueprint.whole is not None) == whole
    model = blueprint.fill(CPU)
    assert type(get(model.kept)) is Tensor
    assert torch.equal(get(model.kept), torch.arange(4.0))
    assert type(model.kept) is type(keep(torch.ones(1)))


def test_a_parameter_also_held_inside_an_object_is_refused():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.holder = Holder(self.linear.weight)

    with pytest.raises(TaskError, match=r"linear.weight is also held inside holder"):
        Blueprint(task(Both))


def test_buffers_that_are_views_of_each_other_stay_so():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("all", torch.arange(6.0))
            self.register_buffer("some", self.all[2:4])
            self.register_buffer("learned", torch.ones(2, requires_grad=True))

    for precision in ("fp32", "fp64"):
        model = Blueprint(task(Views, precision=precision)).fill(CPU)
        model.all[2] = 9.0
        assert model.some.tolist() == [9.0, 3.0]
        assert model.learned.requires_grad


def hooked() -> nn.Module:
    model = nn.Linear(2, 2)
    model.weight.register_hook(lambda gradient: gradient * 0)
    return model


def hooked_after() -> nn.Module:
    model = nn.Linear(2, 2)
    model.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (hooked, "weight has a gradient hook"),
        (hooked_after, "bias has a gradient hook"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "0.weight is lazy"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight, bias of the model are on the meta device"),
    ],
)
def test_what_would_be_lost_is_refused_with_the_remedy(model, message):
    with pytest.raises(TaskError) as caught:
        Blueprint(task(model))
    assert message in str(caught.value)


def test_meta_weights_may_come_from_a_file(tmp_path):
    save_file({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, tmp_path / "start.safetensors")
    given = task(lambda: nn.Linear(2, 2, device="meta"), weights=tmp_path / "start.safetensors")
    assert torch.equal(Blueprint(given).fill(CPU).weight, torch.ones(2, 2))
