"""Where models are cut."""

import torch
from graph_cases import BasicBlock, Recurrent, bert, gpt2, llama, resnet, t5
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sheaf.graph import GLUE, cut, owners


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in cut(model).items()}


def test_a_decoder_is_cut_into_its_layers():
    assert kinds(gpt2()) == {
        "transformer.wte": "Embedding",
        "transformer.wpe": "Embedding",
        "transformer.drop": "Dropout",
        "transformer.h.0": "GPT2Block",
        "transformer.h.1": "GPT2Block",
        "transformer.ln_f": "LayerNorm",
        "lm_head": "Linear",
    }
    assert kinds(gpt2(n_layer=1))["transformer.h.0"] == "GPT2Block"


def test_every_family_of_transformers_is_cut_into_its_layers():
    wanted = {bert: "BertLayer", llama: "LlamaDecoderLayer", t5: "T5Block"}
    for build, layer in wanted.items():
        assert list(kinds(build()).values()).count(layer) == (4 if build is t5 else 2)


def test_torch_transformer_is_cut_into_its_layers():
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    found = list(kinds(model).values())
    assert found == ["TransformerEncoderLayer"] * 2 + ["LayerNorm"] + ["TransformerDecoderLayer"] * 2 + ["LayerNorm"]


def test_residual_blocks_are_whole_and_chains_are_opened():
    found = kinds(resnet())
    assert list(found.values()).count("BasicBlock") == 4
    assert found["1.0"] == "BasicBlock"
    assert "Sequential" not in found.values()


def test_stages_of_different_width_are_opened_and_equal_layers_with_parts_inside_are_not():
    class Stage(nn.Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.parts = nn.ModuleList([BasicBlock(width) for _ in range(depth)])

    stages = nn.ModuleList([Stage(2, 2), Stage(4, 2), Stage(3, 3)])
    assert set(kinds(stages).values()) == {"BasicBlock"}
    layers = nn.ModuleList([Stage(2, 2), Stage(2, 2)])
    assert set(kinds(layers).values()) == {"Stage"}


def test_a_wrapper_is_opened_and_a_lone_module_is_a_block():
    wrapper = nn.Module()
    wrapper.inner = Recurrent()
    wrapper.scale = nn.Parameter(torch.ones(1))
    assert list(cut(wrapper)) == ["inner.embedding", "inner.layers", "inner.output"]
    assert owners(wrapper)[GLUE] == ("scale",)
    assert list(cut(nn.Linear(2, 2))) == [""]
    assert list(cut(nn.MultiheadAttention(8, 2))) == [""]


def test_attention_and_parametrized_layers_stay_whole():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(32, 2),
            "last": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        }
    )
    assert list(cut(model)) == ["attention", "last"]


def test_a_module_under_two_names_is_one_block():
    shared = nn.Linear(2, 2)
    assert list(cut(nn.Sequential(shared, nn.ReLU(), shared))) == ["0", "1"]


def test_tied_weights_belong_to_the_first_block():
    owned = owners(gpt2())
    assert owned["transformer.wte"] == ("transformer.wte.weight",)
    assert owned["lm_head"] == ()


def trees() -> st.SearchStrategy[nn.Module]:
    leaves = st.sampled_from([lambda: nn.Linear(2, 3), nn.ReLU, lambda: nn.LayerNorm(2), lambda: BasicBlock(2)])
    made = leaves.map(lambda build: build())
    return st.recursive(
        made,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map(lambda parts: nn.Sequential(*parts)),
            st.lists(inner, max_size=3).map(nn.ModuleList),
            st.lists(inner, min_size=1, max_size=3).map(_net),
        ),
        max_leaves=8,
    )


def _net(parts: list[nn.Module]) -> nn.Module:
    net = nn.Module()
    net.own = nn.Parameter(torch.zeros(2))
    for index, part in enumerate(parts):
        net.add_module(f"part{index}", part)
    return net


@settings(max_examples=60, deadline=None)
@given(trees())
def test_every_parameter_is_owned_once_and_blocks_do_not_overlap(model: nn.Module):
    owned = [name for names in owners(model).values() for name in names]
    assert sorted(owned) == sorted(name for name, _ in model.named_parameters())
    inside = [id(module) for block in cut(model).values() for module in block.modules()]
    assert len(inside) == len(set(inside))
    assert not any(isinstance(block, nn.ModuleList | nn.ModuleDict) for block in cut(model).values())
