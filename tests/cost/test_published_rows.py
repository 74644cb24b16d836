"""Rows of published runs become workloads, or are refused with every reason."""

import math

import pytest
from published_cases import row

from sheaf.cost.analytic.constants import book
from sheaf.cost.analytic.machine import machine
from sheaf.cost.analytic.rows import Refused, workload
from sheaf.cost.analytic.step import job, seconds


def refused(changed):
    with pytest.raises(Refused) as found:
        workload(changed)
    return found.value.reasons


def test_a_row_is_read():
    work = workload(row())
    assert (work.shape.layers, work.shape.head_width, work.shape.kv_heads) == (24, 128, 16)
    assert (work.micro, work.accumulated, work.split.workers) == (4, 4, 4)
    assert (work.precision, work.mixed, work.split.recompute) == ("fp16", True, "full")


def test_what_was_not_published_follows_from_the_rest_or_is_said_to_be_assumed():
    work = workload(row(batch__micro=None, parallel__dp=None, hardware__gpus_per_node=None, model__vocab=None))
    assert (work.micro, work.split.dp) == (4, 4)
    assert [each.split()[0] for each in work.assumed] == ["model.vocab", "hardware.gpus_per_node"]


def test_layers_may_follow_from_the_size_in_a_name():
    work = workload(row(model__layers=None, model__name="GPT-1.3B"))
    assert work.shape.layers == 24
    assert any("model.layers 24" in each for each in work.assumed)


def test_every_broken_field_is_told_at_once():
    reasons = refused(
        row(
            model__hidden=-5,
            model__heads="many",
            model__layers=None,
            batch__micro=math.nan,
            parallel__tp=1.5,
            parallel__zero_stage=7,
            parallel__recompute=-3,
            hardware__gpu=None,
            precision="int3",
        )
    )
    for place in (
        "hidden",
        "heads",
        "layers",
        "micro",
        "parallel.tp",
        "zero_stage",
        "recompute",
        "hardware.gpu",
        "precision",
    ):
        assert sum(place in reason for reason in reasons) == 1, (place, reasons)


@pytest.mark.parametrize("value", ["x", [], {}, True, math.nan, math.inf, -1, 0, 10**400, 1e30])
@pytest.mark.parametrize("place", ["model__layers", "model__hidden", "parallel__tp", "hardware__num_gpus"])
def test_no_value_of_a_size_crashes(place, value):
    assert any(place.replace("__", ".") in reason for reason in refused(row(**{place: value})))


@pytest.mark.parametrize("given", [None, 3, "text", [], {"model": 4, "batch": [], "parallel": "x", "hardware": 1}])
def test_what_is_no_row_is_refused(given):
    assert refused(given)


def test_a_microbatch_larger_than_the_batch_contradicts():
    assert "more than the whole batch" in refused(row(batch__global=4, batch__micro=4))[0]


def test_models_that_no_formula_knows_are_refused_by_their_layers():
    assert refused(row(model__family="hybrid-mamba"))[0].startswith("model.family: state-space layers")


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(Refused, match="did you mean A100-SXM4-80GB"):
        machine(workload(row(hardware__gpu="A1000-SXM4-80GB")))


@pytest.mark.parametrize(
    ("said", "taken"),
    [("H100 NVL", "H100-SXM5-80GB"), ("A100-PCIE-40GB", "A100-SXM4-40GB"), ("GB200", None), ("T4", None)],
)
def test_a_device_of_a_known_generation_is_taken_as_the_nearest_and_that_is_said(said, taken):
    found = machine(workload(row(hardware__gpu=said)))
    assert bool(found.assumed) == bool(taken)
    assert all(said in each and str(taken) in each for each in found.assumed)


def test_a_word_that_begins_like_a_device_is_not_that_device():
    with pytest.raises(Refused, match="'A10' is not known"):
        machine(workload(row(hardware__gpu="A10")))


def test_layers_that_divide_only_with_embedding_and_head_are_dealt_out_with_them():
    plan = {"parallel__tp": 1, "parallel__pp": 4, "parallel__dp": 1, "model__layers": 30}
    assert job(workload(row(**plan)), book()).stages == (7.0, 8.0, 8.0, 7.0)
    assert job(workload(row(**plan | {"model__layers": 32})), book()).stages == (8.0,) * 4


def test_the_last_of_chunks_is_shorter_where_it_predicts_further_ahead():
    model = {"family": "moe", "name": "DeepSeekV3", "layers": 61, "hidden": 7168, "heads": 128, "head_dim": 128}
    model |= {"ffn": 18432, "vocab": 129280, "seq": 4096, "glu": True, "experts": 256, "experts_topk": 8}
    model |= {"moe_ffn": 2048, "attention": "MLA causal"}
    for stages, chunks, found in (
        (8, 1, (8.0,) * 7 + (6.0,)),  # 5 and the one ahead
        (2, 8, (32.0, 30.0)),  # "Et*4|(t*4|)*14tmL"
        (4, 8, (16.0, 16.0, 15.0, 15.0)),  # 30 pairs, one alone, and the one ahead by itself
    ):
        plan = {"parallel__tp": 1, "parallel__pp": stages, "parallel__dp": 1, "parallel__vpp": chunks}
        assert job(workload(row(model=model, **plan, hardware__num_gpus=stages)), book()).stages == found


def test_the_software_is_the_title_of_the_section_where_a_run_says_so():
    page = "gpt2.md:466 [GPT2 Experiments > Allocation > {}]"
    said = {"software": "see section title", "parallel__zero_stage": 3}
    for title, stack in (("HF + Deepspeed Zero 3", "jean-zay-hf"), ("Megatron + Deepspeed ZeRO", "jean-zay-zero")):
        assert job(workload(row(**said, location=page.format(title))), book()).stack.name == stack


@pytest.mark.parametrize("experts", [10**7, 3])
def test_any_number_of_experts_is_priced_at_once(experts):
    many = row(model__family="moe", model__experts=experts, model__experts_topk=1, model__moe_ffn=64)
    assert sum(seconds(job(workload(many), book()), book().expected()).values()) > 0


def test_no_more_experts_are_chosen_or_spread_than_there_are():
    few = {"model__family": "moe", "model__experts": 8, "model__moe_ffn": 64}
    for more in ({"model__experts_topk": 9}, {"model__experts_topk": 1, "parallel__ep": 16}):
        assert refused(row(**few, **more))[0].startswith("model.experts: 8; ")


def test_a_split_that_is_not_known_is_said_to_be_left_out():
    assert workload(row()).assumed == ()
    said = workload(row(parallel__ulysses=4, parallel__pp=4, parallel__dp=1, parallel__schedule="zero-bubble")).assumed
    assert any("parallel.ulysses left out" in each for each in said)
    assert any("'zero-bubble' is not known" in each for each in said)
    assert "parallel.recompute none: 'abc' is not known" in workload(row(parallel__recompute="abc")).assumed


def test_hosts_of_four_have_their_own_links():
    four = row(hardware__gpu="V100-SXM2-32GB", hardware__gpus_per_node=4)
    eight = row(hardware__gpu="V100-SXM2-32GB", hardware__gpus_per_node=8)
    pair = {name: machine(workload(each)) for name, each in (("four", four), ("eight", eight))}
    seconds_of = {
        name: found.ring_seconds(found.group(2), 1e8, intra=1.0, inter=1.0, rounds=2.0) for name, found in pair.items()
    }
    assert seconds_of["eight"] / seconds_of["four"] == pytest.approx(2.0, rel=0.05)  # one link of a mesh, and two


def test_recipes_say_what_tables_leave_out():
    experts = {"model__family": "moe", "model__experts": 128, "model__experts_topk": 8, "model__moe_ffn": 768}
    common = {**experts, "software": "NeMo 26.02", "precision": "MXFP8", "model__name": "Qwen3_235B_a22B"}
    hosts = [job(workload(row(**common, hardware__gpu=device)), book()).stack.launched for device in ("GB200", "B200")]
    assert hosts[0] < hosts[1] == 1.0


def test_two_kinds_of_devices_go_at_the_slower_ones_pace():
    both = machine(workload(row(hardware__gpu="RTX-3090 x2 + Titan-RTX x2")))
    alone = machine(workload(row(hardware__gpu="RTX-3090")))
    assert both.flops_per_second("fp32") < alone.flops_per_second("fp32")


def test_stages_may_be_counts_or_boundaries_with_embedding_and_head():
    counts = workload(row(parallel__pp=2, parallel__dp=2, parallel__layer_partition=[12, 14])).split.stages
    boundaries = workload(row(parallel__pp=2, parallel__dp=2, parallel__layer_partition=[0, 12, 26])).split.stages
    assert counts == boundaries == (11, 13)


def test_the_count_of_workers_wins_over_factors_that_do_not_make_it():
    work = workload(row(parallel__tp=4, parallel__pp=8, parallel__dp=1, hardware__num_gpus=16))
    assert work.split.workers == 16
    assert work.assumed
