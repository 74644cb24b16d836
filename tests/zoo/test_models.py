"""The zoo's models have the published sizes, start well scaled, and treat padding as nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sheaf.zoo.models import GPT, MLP, ResNet


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small_gpt(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(**({"vocabulary": 20, "context": 16, "width": 16, "layers": 2, "heads": 2, "dropout": 0.0} | changes))


@pytest.mark.parametrize(
    ("width", "layers", "heads", "published"),
    [
        (768, 12, 12, 124_439_808),
        (1024, 24, 16, 354_823_168),
        (1280, 36, 20, 774_030_080),
        (1600, 48, 25, 1_557_611_200),
    ],
)
def test_gpt_has_the_sizes_of_gpt2(width, layers, heads, published):
    with torch.device("meta"):
        assert count(GPT(width=width, layers=layers, heads=heads)) == published


@pytest.mark.parametrize(("blocks", "millions"), [(3, 0.27), (5, 0.46), (7, 0.66), (9, 0.85), (18, 1.7)])
def test_resnet_has_the_sizes_of_the_paper(blocks, millions):
    assert count(ResNet(blocks=blocks)) / 1e6 == pytest.approx(millions, rel=0.03)


def test_mlp_is_784_10_10_unless_told_otherwise():
    assert [layer.weight.shape for layer in MLP().layers] == [(10, 784), (10, 10)]
    assert MLP((3, 4, 5, 6))(torch.zeros(2, 3)).shape == (2, 6)
    with pytest.raises(ValueError, match="at least how many"):
        MLP((3,))


def test_an_untied_head_is_a_matrix_of_its_own():
    tied, untied = small_gpt(), small_gpt(tied=False)
    assert tied.head.weight is tied.tokens.weight
    assert untied.head.weight is not untied.tokens.weight
    assert count(untied) - count(tied) == 20 * 16


def test_models_start_with_the_loss_of_a_guess():
    torch.manual_seed(0)
    gpt = GPT(vocabulary=256, context=32, width=64, layers=4, heads=4, dropout=0.0)
    tokens = torch.randint(256, (8, 32))
    loss = nn.functional.cross_entropy(gpt(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(math.log(256), rel=0.03)


def test_gpt_sees_no_later_token():
    model, tokens = small_gpt(), torch.arange(10)[None] % 20
    changed = tokens.clone()
    changed[0, 7] = 19
    apart = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert torch.all(apart[:7] == 0)
    assert torch.all(apart[7:] > 0)


@given(before=st.integers(0, 3), after=st.integers(0, 3), length=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_padding_changes_no_logits_of_real_tokens(before, after, length):
    model = small_gpt(padding=19)
    tokens = torch.arange(length)[None]
    padded = nn.functional.pad(tokens, (before, after), value=19)
    logits = model(padded)
    torch.testing.assert_close(logits[:, before : before + length], model(tokens), atol=1e-6, rtol=1e-5)
    assert torch.isfinite(logits).all()


def test_gpt_drops_attention_while_training_only():
    tokens = torch.arange(10)[None]
    model = small_gpt(dropout=0.5)
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0  # what is left is the dropout inside attention
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_gpt_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="16"):
        small_gpt()(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="heads=3"):
        small_gpt(heads=3)


def test_resnet_halves_the_image_twice_and_its_shortcut_keeps_the_input():
    model = ResNet(blocks=1, channels=1)
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert shapes == [(2, 16, 8, 8), (2, 32, 4, 4), (2, 64, 2, 2)]
    block = model.blocks[1]
    nn.init.zeros_(block.norm_2.weight)  # the residual branch adds nothing
    images = torch.rand(2, 16, 8, 8)
    torch.testing.assert_close(block(images)[:, 8:24], images[:, :, ::2, ::2])
