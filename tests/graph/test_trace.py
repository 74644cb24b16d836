"""The facts of traced models."""

import resource
from typing import Any

import pytest
import torch
from graph_cases import (
    Recurrent,
    bert,
    gpt2,
    image_task,
    llama,
    t5,
    task,
    text_task,
    texts,
    vectors,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from sheaf.errors import TaskError
from sheaf.graph import GLUE, LOSS, ModelFacts, cut, ops, trace
from sheaf.task import arguments, as_loss, fetch
from sheaf.task.blueprint import Blueprint


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))


def counted(one: Any) -> int:
    """Operations of one real microbatch, as torch counts them."""
    model = Blueprint(one).fill(torch.device("cpu"))
    batch = fetch(one, range(4), 0)
    with FlopCounterMode(display=False) as counter:
        positional, named = arguments(one, batch)
        as_loss(one.loss(model(*positional, **named), batch), 4).sum.backward()
    return counter.get_total_flops()


def test_a_small_network_by_hand():
    facts = trace(task(mlp, vectors(10), lambda output, batch: nn.functional.cross_entropy(output, batch[1])), 4)
    first, middle, last = facts.blocks[:3]
    assert [block.name for block in facts.blocks] == ["0", "1", "2", GLUE, LOSS]
    assert first.forward_flops == 2 * 4 * 10 * 20
    assert first.backward_flops == 2 * 4 * 10 * 20  # the input needs no gradient
    assert last.backward_flops == 2 * (2 * 4 * 20 * 3)
    assert (first.saved_bytes, first.saved_input_bytes) == (0, 4 * 10 * 4)
    assert (middle.saved_bytes, middle.saved_input_bytes) == (4 * 20 * 4, 0)  # its output
    assert (last.saved_bytes, last.saved_input_bytes) == (0, 0)  # its input, which ReLU saved
    assert (last.input_bytes, last.output_bytes) == (4 * 20 * 4, 4 * 3 * 4)
    assert first.forward_bytes == 4 * (4 * 10 + 20 * 10 + 20 + 4 * 20)
    assert (first.forward_kernels, middle.forward_kernels) == (1, 1)
    assert facts.num_parameters == 10 * 20 + 20 + 20 * 3 + 3
    assert facts.parameter("0.weight").shape == (20, 10)
    assert facts.batch_bytes == 4 * 10 * 4 + 4 * 8
    assert facts.draws == facts.batch_dependent == ()


@pytest.mark.parametrize("build", [mlp, None], ids=["mlp", "resnet"])
def test_saved_bytes_are_what_autograd_really_keeps(build: Any):
    one = task(mlp, vectors(10)) if build else image_task()
    model = Blueprint(one).fill(torch.device("cpu"))
    batch = fetch(one, range(4), 0)
    lasting = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in lasting:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        as_loss(one.loss(model(arguments(one, batch)[0][0]), batch), 4)
    assert trace(one, 4).saved_bytes == sum(kept.values())


@pytest.mark.parametrize("build", [gpt2, bert, t5, llama])
def test_transformers_models_pass_as_they_are(build: Any):
    one = text_task(build, labels=build is t5)
    facts = trace(one, 4)
    owned = [name for block in facts.blocks for name in block.parameters]
    assert sorted(owned) == sorted(parameter.name for parameter in facts.parameters)
    assert set(cut(build())) == {block.name for block in facts.blocks} - {GLUE, LOSS}
    layers = [block for block in facts.blocks if block.kind in ("GPT2Block", "BertLayer", "LlamaDecoderLayer")]
    assert len({layer.signature for layer in layers}) <= 1
    assert all(layer.backward_flops == pytest.approx(2 * layer.forward_flops, rel=0.1) for layer in layers)
    assert bool(facts.draws) is (build is not llama)


def test_operations_agree_with_torch():
    for one in (task(mlp, vectors(10)), image_task(), text_task(bert)):
        assert trace(one, 4).flops == counted(one)


def test_fused_attention_is_counted():
    facts = trace(text_task(lambda: gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)), 4)
    matrices = 2 * 4 * 16 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    attention = 2 * 2 * 4 * 16 * 16 * 32
    assert facts.block("transformer.h.0").forward_flops == matrices + attention
    assert facts.draws == ()


def test_recurrent_layers_are_counted():
    for kind in (nn.LSTM, nn.GRU):
        one = text_task(lambda kind=kind: Recurrent(kind), inputs=lambda batch: (batch,))
        layers = trace(one, 4).block("layers")
        weights = sum(weight.numel() for weight in kind(8, 8, 2, bias=False).parameters())
        assert layers.forward_flops == 2 * 4 * 16 * weights


def test_recurrent_layers_count_alike_from_torchs_cache():
    one = text_task(lambda: Recurrent(nn.LSTM), inputs=lambda batch: (batch,))
    FakeTensorMode.cache_clear()
    first = trace(one, 4)
    assert first == trace(one, 4), "the kernel gives one tensor as the gradient of both biases"


def test_tied_weights_are_aliases_and_counted_once():
    facts = trace(text_task(gpt2), 4)
    tied = facts.parameter("transformer.wte.weight")
    assert tied.aliases == ("lm_head.weight",)
    assert facts.block("lm_head").parameter_bytes == 0
    assert facts.parameter_bytes == sum(block.parameter_bytes for block in facts.blocks)


def test_dropout_and_batch_normalisation_are_found():
    facts = trace(image_task(), 4)
    assert facts.draws == ("5",)
    assert facts.batch_dependent == ("1.0.norm", "1.1.norm", "2.0.norm", "2.1.norm")
    assert [buffer.updated for buffer in facts.buffers] == [True] * 12
    assert facts.block("1.0").batch_dependent
    assert not facts.block("6").batch_dependent


def test_instance_normalisation_depends_on_no_other_sample():
    facts = trace(image_task(lambda: nn.Sequential(nn.InstanceNorm2d(1), nn.Flatten(), nn.Linear(64, 3))), 4)
    assert facts.batch_dependent == ()


def test_a_changed_buffer_is_found():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()), persistent=False)
            self.layer = nn.Linear(4, 4)

        def forward(self, value: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return self.layer(value)

    (buffer,) = trace(task(Counting, vectors(4)), 4).buffers
    assert (buffer.name, buffer.updated, buffer.persistent) == ("seen", True, False)


@pytest.mark.parametrize(("precision", "width"), [("fp64", 8), ("bf16", 2), ("fp16", 2)])
def test_precision_changes_what_is_kept(precision: str, width: int):
    facts = trace(task(mlp, vectors(10), precision=precision), 4)
    assert facts.block("1").saved_bytes == 4 * 20 * width
    assert facts.parameter("0.weight").itemsize_bytes == (8 if precision == "fp64" else 4)


class Projecting(nn.Module):
    """A matrix that is no parameter, in a model that is too large to be traced for real."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.basis, self.large = nn.Linear(10, 3), torch.eye(10), nn.Parameter(torch.zeros(2**29))

    def forward(self, given: Tensor) -> Tensor:
        return self.layer(given @ self.basis)


def test_what_is_no_parameter_has_the_tasks_precision_too():
    one = task(Projecting, vectors(10), precision="fp64")
    assert trace(one, 4).block("layer").forward_flops == 2 * 4 * 10 * 3


def test_a_hundred_billion_parameters_allocate_nothing():
    def build() -> nn.Module:
        return gpt2(n_layer=12, n_embd=26624, n_head=208, n_positions=1024, vocab_size=50257)

    one = text_task(build, data=texts(1024, 50257, 2), batch=2, microbatch=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = trace(one, 1)
    grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert facts.num_parameters > 1e11
    assert facts.flops == pytest.approx(6 * facts.num_parameters * 1024, rel=0.05)
    assert grown_bytes < 2**30


def test_a_wrong_shape_names_the_module():
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 4), nn.Sequential(nn.ReLU(), nn.Linear(5, 3)))

    with pytest.raises(TaskError, match=r"module 1\.1 \(Linear\).*\(4x4 and 5x3\).*float32\[4, 10\]"):
        trace(task(build, vectors(10)), 4)


@pytest.mark.parametrize("build", [mlp, lambda: nn.Sequential(nn.Linear(10, 3, bias=False))], ids=["bias", "none"])
@pytest.mark.parametrize("kind", [torch.float64, torch.int64])
def test_data_of_another_type_than_the_weights_is_told(build: Any, kind: torch.dtype):
    wrong = [(torch.ones(10, dtype=kind), torch.tensor(1)) for _ in range(8)]
    name = str(kind).removeprefix("torch.")
    both = " and ".join(sorted(["float32", name]))
    with pytest.raises(TaskError, match=rf"module 0 \(Linear\).*{both}.*the batch is {name}\[4, 10\]"):
        trace(task(build, wrong), 4)


def test_types_that_an_accelerators_autocast_may_bring_together_are_let_pass():
    single, half = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bfloat16)
    ops.refuse_mixed(torch.ops.aten.mm.default, (single, half))
    with pytest.raises(RuntimeError, match="bfloat16 and float64"):
        ops.refuse_mixed(torch.ops.aten.mm.default, (half, single.double()))


def test_a_failing_loss_is_told_with_its_line():
    def loss(output: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(output, batch["nothing"])

    with pytest.raises(TaskError, match=r"the loss function raised TypeError.*test_trace\.py:\d+"):
        trace(task(mlp, vectors(10), loss), 4)


class Branching(nn.Module):
    """Takes a path that depends on values."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.layer = nn.Linear(10, width)

    def forward(self, value: Tensor) -> Tensor:
        value = self.layer(value)
        if value.sum() > 0:
            return value * 2
        return value


def test_a_small_model_with_a_branch_on_values_is_traced_for_real():
    facts = trace(task(Branching, vectors(10)), 4)
    assert facts.block("layer").forward_flops == 2 * 4 * 10 * 10


def test_what_nobody_needs_is_freed_while_a_model_is_traced_for_real():
    freed = list[bool]()

    class Frugal(Branching):
        def forward(self, value: Tensor) -> Tensor:
            large = super().forward(value) + 1
            storage = StorageWeakRef(large.untyped_storage())
            made = large.mean()
            del large
            freed.append(storage.expired())
            return made

    trace(task(Frugal, vectors(10)), 4)
    assert freed == [True], "it stops at the branch on fake tensors"


def test_a_large_model_with_a_branch_on_values_is_refused_with_its_line():
    with pytest.raises(TaskError, match=r"Branching.*test_trace\.py:\d+ \(if value\.sum\(\) > 0:\).*torch\.where"):
        trace(task(lambda: Branching(10**9), vectors(10)), 4)


def test_tracing_leaves_random_streams_and_repeats_itself():
    def run() -> ModelFacts:
        return trace(text_task(gpt2), 4)

    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    first = run()
    assert torch.equal(torch.rand(1), wanted)
    assert first == run()


def test_a_recomputing_model_is_counted_where_it_computes():
    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 10)

        def forward(self, value: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.part, value, use_reentrant=False)

        def part(self, value: Tensor) -> Tensor:
            return self.layer(value).relu()

    facts = trace(task(Recomputing, vectors(10)), 4)
    layer = facts.block("layer")
    assert (layer.calls, layer.forward_flops, layer.backward_flops) == (1, 800, 1600)
