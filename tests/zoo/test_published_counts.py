"""The zoo's larger models have the published sizes, and compute what others' implementations of their papers do."""

import pytest
import torch
from torch import nn

from sheaf.zoo.models import BERT, VGG, AlexNet, BottleneckResNet, MoE, Seq2Seq, Transformer, UNet3d
from sheaf.zoo.models.moe import Experts
from sheaf.zoo.models.unet3d import Convolutions


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (AlexNet, 61_100_840),
        (VGG, 138_357_544),
        (lambda: VGG(depths=(1, 1, 2, 2, 2)), 132_863_336),
        (lambda: VGG(depths=(2, 2, 4, 4, 4)), 143_667_240),
        (BottleneckResNet, 25_557_032),
        (lambda: BottleneckResNet(blocks=(3, 4, 23, 3)), 44_549_160),
        (lambda: BottleneckResNet(blocks=(3, 8, 36, 3)), 60_192_808),
        (BERT, 109_514_298),
    ],
    ids=["alexnet", "vgg16", "vgg11", "vgg19", "resnet50", "resnet101", "resnet152", "bert"],
)
def test_a_model_has_exactly_the_published_size(model, published):
    with torch.device("meta"):
        assert count(model()) == published


def test_bert_with_a_pooler_in_place_of_its_head_has_the_size_of_berts_encoder():
    with torch.device("meta"):
        model, pooler = BERT(), nn.Linear(768, 768)
    head = count(model.transform) + count(model.transform_norm) + model.head.bias.numel()
    assert count(model) - head + count(pooler) == 109_482_240


def test_vgg_has_its_parameters_where_the_plan_wants_them():
    with torch.device("meta"):
        model = VGG()
    assert count(model.classifier) == 123_642_856
    assert count(model.features) + count(model.classifier) == count(model)


@pytest.mark.parametrize(
    ("sizes", "exactly", "millions"),
    [({}, 63_082_496, 65), ({"width": 1024, "heads": 16, "wide": 4096}, 214_245_376, 213)],
    ids=["base", "big"],
)
def test_the_transformer_has_about_the_sizes_of_the_paper(sizes, exactly, millions):
    with torch.device("meta"):
        model = Transformer(**sizes)
    assert count(model) == exactly
    assert exactly / 1e6 == pytest.approx(millions, rel=0.03)


def test_the_lstms_have_the_size_of_the_model_that_attention_was_added_to():
    with torch.device("meta"):
        model = Seq2Seq(source_vocabulary=160_000, target_vocabulary=80_000)
        luong = Seq2Seq()
    assert (count(model) - count(model.attention)) / 1e6 == pytest.approx(384, abs=0.5)
    assert count(model.encoder) / 1e6 == pytest.approx(32, abs=0.5)
    assert count(model.decoder) / 1e6 == pytest.approx(32, abs=0.5)
    assert count(luong) == 217_064_000


def test_the_volume_network_has_the_size_of_the_paper_without_the_scales_of_its_norms():
    with torch.device("meta"):
        model = UNet3d()
    scales = sum(norm.weight.numel() for norm in model.modules() if isinstance(norm, nn.BatchNorm3d))
    assert count(model) - scales == 19_069_955


def test_the_mixture_has_the_size_of_glam():
    with torch.device("meta"):
        model = MoE()
    assert count(model) == 1_909_814_016
    assert count(model) / 1e9 == pytest.approx(1.9, rel=0.01)
    assert sum(isinstance(module, Experts) for module in model.modules()) == 6


@pytest.mark.parametrize(
    ("model", "part", "images", "shape"),
    [
        (AlexNet, "features", (1, 3, 224, 224), (1, 256, 6, 6)),
        (VGG, "features", (1, 3, 224, 224), (1, 512, 7, 7)),
        (BottleneckResNet, "blocks", (1, 3, 224, 224), (1, 2048, 7, 7)),
        (UNet3d, "", (1, 3, 116, 132, 132), (1, 3, 28, 44, 44)),
    ],
    ids=["alexnet", "vgg16", "resnet50", "unet3d"],
)
def test_the_papers_images_have_the_papers_sizes_inside(model, part, images, shape):
    with torch.device("meta"):
        built, found = model(), []
        watched = built.blocks[-1] if part == "blocks" else built.get_submodule(part)
        watched.register_forward_hook(lambda _module, _inputs, output: found.append(tuple(output.shape)))
        built(torch.empty(images))
    assert found == [shape]


def test_bert_computes_what_transformers_does():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    config = transformers.BertConfig(vocab_size=31, max_position_embeddings=9, pad_token_id=0, **sizes)
    theirs = transformers.BertForMaskedLM(config).eval()
    ours = BERT(vocabulary=31, context=9, width=12, layers=2, heads=3, wide=20, padding=0).eval()
    names = [
        ("bert.embeddings.word_embeddings", "words"),
        ("bert.embeddings.position_embeddings", "positions"),
        ("bert.embeddings.token_type_embeddings", "types"),
        ("bert.embeddings.LayerNorm", "norm"),
        ("bert.encoder.layer", "layers"),
        ("attention.self.query", "attention.queries"),
        ("attention.self.key", "attention.keys"),
        ("attention.self.value", "attention.values"),
        ("attention.output.dense", "attention.out"),
        ("attention.output.LayerNorm", "attention_norm"),
        ("intermediate.dense", "feed_in"),
        ("output.dense", "feed_out"),
        ("output.LayerNorm", "feed_norm"),
        ("cls.predictions.transform.dense", "transform"),
        ("cls.predictions.transform.LayerNorm", "transform_norm"),
        ("cls.predictions.decoder", "head"),
    ]
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    weights = {}
    for name, value in theirs.state_dict().items():
        for before, after in names:
            name = name.replace(before, after)
        weights[name] = value
    del weights["cls.predictions.bias"]  # the head's, under a second name
    ours.load_state_dict(weights)
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 0, 0, 0]])
    types = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]])
    expected = theirs(input_ids=tokens, token_type_ids=types, attention_mask=(tokens != 0).long()).logits
    real = tokens != 0
    torch.testing.assert_close(ours(tokens, types)[real], expected[real], atol=1e-4, rtol=1e-4)


def test_the_transformer_computes_what_torchs_own_layers_do():
    torch.manual_seed(0)
    ours = Transformer(vocabulary=31, width=12, layers=2, heads=3, wide=20, padding=0).eval()
    options = {"d_model": 12, "nhead": 3, "dim_feedforward": 20, "dropout": 0.0, "batch_first": True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), 2, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), 2)
    for theirs, mine in zip(encoder.layers, ours.encoder, strict=True):
        lend_attention(theirs.self_attn, mine.attention)
        lend(theirs, {"linear1": mine.feed.into, "linear2": mine.feed.out})
        lend(theirs, {"norm1": mine.attention_norm, "norm2": mine.feed_norm})
    for theirs, mine in zip(decoder.layers, ours.decoder, strict=True):
        lend_attention(theirs.self_attn, mine.attention)
        lend_attention(theirs.multihead_attn, mine.look)
        lend(theirs, {"linear1": mine.feed.into, "linear2": mine.feed.out})
        lend(theirs, {"norm1": mine.attention_norm, "norm2": mine.look_norm, "norm3": mine.feed_norm})
    source = torch.tensor([[3, 4, 5, 6], [9, 10, 0, 0]])
    target = torch.tensor([[1, 4, 5, 6, 7], [1, 10, 2, 4, 0]])
    hidden = source == 0
    later = nn.Transformer.generate_square_subsequent_mask(5)
    memory = encoder(ours._embedded(source), src_key_padding_mask=hidden)
    written = decoder(ours._embedded(target), memory, tgt_mask=later, memory_key_padding_mask=hidden)
    torch.testing.assert_close(ours(source, target), written @ ours.tokens.weight.T, atol=1e-5, rtol=1e-5)


def lend(theirs: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        getattr(theirs, name).load_state_dict(module.state_dict())


def lend_attention(theirs: nn.MultiheadAttention, mine: nn.Module) -> None:
    parts = (mine.queries, mine.keys, mine.values)
    weights = {
        "in_proj_weight": torch.cat([part.weight for part in parts]),
        "in_proj_bias": torch.cat([part.bias for part in parts]),
        "out_proj.weight": mine.out.weight,
        "out_proj.bias": mine.out.bias,
    }
    theirs.load_state_dict(weights)


def test_padding_changes_no_logits_of_real_tokens_of_bert_transformer_and_moe():
    torch.manual_seed(0)
    sizes = {"vocabulary": 20, "width": 12, "layers": 2, "heads": 3, "dropout": 0.0, "padding": 0}
    text = torch.arange(1, 6)[None]
    longer = nn.functional.pad(text, (0, 3))
    bert = BERT(**sizes, context=9, wide=20)
    torch.testing.assert_close(bert(longer)[:, :5], bert(text), atol=1e-6, rtol=1e-5)
    transformer = Transformer(**sizes, wide=20)
    torch.testing.assert_close(transformer(longer, longer)[:, :5], transformer(text, text), atol=1e-6, rtol=1e-5)
    moe = MoE(**sizes, context=9, experts=4, capacity=4.0)
    torch.testing.assert_close(moe(longer).logits[:, :5], moe(text).logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(moe(longer).balance, moe(text).balance)


def test_attention_of_the_lstms_never_looks_at_padding():
    torch.manual_seed(0)
    model = Seq2Seq(source_vocabulary=20, target_vocabulary=20, width=6, layers=1, padding=0).eval()
    memory, hidden = torch.randn(1, 4, 6), torch.randn(1, 2, 6)
    real = torch.tensor([[False, True, True, True]])
    torch.testing.assert_close(model.attention(hidden, memory, real), model.attention(hidden, memory[:, 1:], None))


def test_a_token_is_fed_by_its_chosen_experts_in_their_shares():
    torch.manual_seed(0)
    layer = Experts(6, 10, experts=5, chosen=2, capacity=5.0)  # places for all
    nn.init.normal_(layer.feed_in_bias)
    nn.init.normal_(layer.feed_out_bias)
    nn.init.normal_(layer.gate.weight)
    hidden = torch.randn(2, 7, 6)
    expected = torch.zeros_like(hidden)
    for row, token in ((row, token) for row in range(2) for token in range(7)):
        given = hidden[row, token]
        shares, choices = layer.gate(given).softmax(-1).topk(2)
        for share, expert in zip(shares / shares.sum(), choices, strict=True):
            wide = nn.functional.gelu(given @ layer.feed_in[expert] + layer.feed_in_bias[expert], approximate="tanh")
            expected[row, token] += share * (wide @ layer.feed_out[expert] + layer.feed_out_bias[expert])
    torch.testing.assert_close(layer(hidden, None)[0], expected, atol=1e-6, rtol=1e-5)


def test_an_expert_without_places_left_feeds_no_more_tokens_and_padding_takes_none():
    layer = Experts(4, 8, experts=4, chosen=1, capacity=1.0)
    nn.init.constant_(layer.gate.weight, 0.0)
    layer.gate.weight.data[2] = 1.0  # for positive tokens, all choose the third
    nn.init.ones_(layer.feed_out_bias)
    hidden = torch.rand(1, 8, 4)
    fed, balance = layer(hidden, None)
    assert fed.abs().sum(-1).gt(0).tolist() == [[True, True] + [False] * 6]  # 8 tokens over 4 experts: 2 places
    assert balance.item() > 1
    real = torch.tensor([[False, True] * 4])
    assert layer(hidden, real)[0].abs().sum(-1).gt(0).tolist() == [[False, True, False, True] + [False] * 4]


def test_balance_is_one_where_experts_are_used_evenly():
    layer = Experts(4, 8, experts=4, chosen=1, capacity=1.0)
    layer.gate.weight.data = torch.eye(4) * 100
    assert layer(torch.eye(4)[None], None)[1].item() == pytest.approx(1.0)


def test_volumes_that_do_not_halve_are_cut_to_their_middle():
    model = UNet3d(channels=1, classes=2, widths=(4, 6), padded=True)
    assert model(torch.rand(2, 1, 9, 8, 6)).shape == (2, 2, 8, 8, 6)
    assert Convolutions(1, 2, 3, padded=False)(torch.rand(2, 1, 9, 9, 9)).shape == (2, 3, 5, 5, 5)
