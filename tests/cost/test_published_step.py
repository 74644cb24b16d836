"""Seconds and bytes of published runs: they add up, and change the way the machine and the plan do."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_cases import row

from sheaf.cluster import read
from sheaf.cost.analytic.constants import book, kind_of
from sheaf.cost.analytic.layers import layer
from sheaf.cost.analytic.memory import BYTES, peak
from sheaf.cost.analytic.products import tiled_flops
from sheaf.cost.analytic.rows import workload
from sheaf.cost.analytic.score import model_flops
from sheaf.cost.analytic.step import TERMS, job, seconds


def priced(changed, **machine):
    made = job(workload(changed), book())
    if machine:
        made = dataclasses.replace(made, machine=dataclasses.replace(made.machine, **machine))
    return seconds(made, made.book.constants(made.stack, made.kind), {})


def total(changed, **machine):
    return sum(priced(changed, **machine).values())


def held(changed):
    return peak(job(workload(changed), book()))


PLANS = st.fixed_dictionaries(
    {
        "parallel__tp": st.sampled_from([1, 2, 4, 8]),
        "parallel__pp": st.sampled_from([1, 2, 4]),
        "parallel__dp": st.sampled_from([1, 2, 16]),
        "parallel__zero_stage": st.sampled_from([0, 1, 2, 3]),
        "parallel__recompute": st.sampled_from(["none", "selective", "full", "save dots", "selective (per-op)"]),
        "batch__micro": st.sampled_from([1, 2, 8]),
        "precision": st.sampled_from(["fp16", "bf16", "fp32", "fp8"]),
        "software": st.sampled_from(["Megatron-DeepSpeed", "NeMo 26.02", "Composer", "unheard of"]),
    }
)


def planned(plan):
    workers = plan["parallel__tp"] * plan["parallel__pp"] * plan["parallel__dp"]
    batch = plan["batch__micro"] * plan["parallel__dp"] * 4
    return row(**plan, hardware__num_gpus=workers, batch__global=batch, batch__grad_accum=4)


@given(PLANS)
@settings(max_examples=60, deadline=None)
def test_every_term_is_there_and_none_is_negative(plan):
    terms = priced(planned(plan))
    assert tuple(terms) == TERMS
    assert all(value >= 0 for value in terms.values())
    memory = held(planned(plan))
    assert set(memory) == set(BYTES)
    assert all(value >= 0 for value in memory.values())


@given(PLANS, st.floats(min_value=1.01, max_value=50))
@settings(max_examples=60, deadline=None)
def test_more_bandwidth_is_never_slower(plan, times):
    changed = planned(plan)
    made = job(workload(changed), book()).machine
    before = total(changed)
    assert total(changed, host_bytes_per_second=made.host_bytes_per_second * times) <= before * (1 + 1e-9)
    assert total(changed, intra_bytes_per_second=made.intra_bytes_per_second * times) <= before * 1.02


def test_twice_the_microbatches_take_twice_as_long_but_for_what_is_once_a_step():
    one, two = priced(row(batch__grad_accum=4)), priced(row(batch__grad_accum=8, batch__global=128))
    assert two["matmul"] == pytest.approx(2 * one["matmul"])
    assert two["optimizer"] == pytest.approx(one["optimizer"])


def test_products_fill_whole_tiles():
    assert tiled_flops(1024, 1025, 1024, 1, 16.0, 0.0) > 1.05 * tiled_flops(1024, 1024, 1024, 1, 16.0, 0.0)


def test_shards_that_share_cache_lines_cost_a_third():
    even = priced(row(model__hidden=14336, model__heads=64, model__ffn=57344, parallel__tp=8, hardware__num_gpus=32))
    odd = priced(row(model__hidden=14400, model__heads=100, model__ffn=57600, parallel__tp=8, hardware__num_gpus=32))
    assert 1.2 < odd["matmul"] / even["matmul"] < 1.5


def test_idle_stages_shrink_with_microbatches_and_interleaving():
    pipeline = {"parallel__pp": 4, "parallel__dp": 1, "hardware__num_gpus": 4}
    few, many = row(**pipeline, batch__global=16), row(**pipeline, batch__global=64, batch__grad_accum=16)
    shares = [priced(each)["bubble"] / total(each) for each in (few, many)]
    assert shares[0] > 2 * shares[1]
    assert priced(row(**pipeline, batch__global=16, parallel__vpp=2))["bubble"] < 0.6 * priced(few)["bubble"]


def test_groups_beside_share_a_hosts_network_cards():
    machine = job(
        workload(row(hardware__num_gpus=64, parallel__dp=64, batch__global=256, batch__grad_accum=1)), book()
    ).machine
    ring = {"intra": 1.0, "inter": 1.0, "rounds": 2.0}
    alone = machine.ring_seconds(machine.group(8), 1e9, **ring)
    across = machine.ring_seconds(machine.group(16), 1e9, **ring)
    shared = machine.ring_seconds(machine.group(16, stride=8), 1e9, **ring)
    assert alone < across < shared
    assert shared == pytest.approx(2 * 15 / 16 * 1e9 / 25e9, rel=0.05)  # one card of eight, 25 GB/s


def test_model_flops_are_six_per_parameter_and_token_and_attention():
    made = job(workload(row()), book())
    tokens = 64 / 4 * 1024
    parameters = 24 * 12 * 2048**2 + 50257 * 2048
    attention = 24 * 12 * 1024 * 2048
    assert model_flops(made) == pytest.approx(tokens * (6 * parameters + attention), rel=0.01)


def test_memory_of_a_known_model():
    plain = held(row(parallel__recompute="none"))
    parameters = 24 * 12 * 2048**2 + 50257 * 2048
    assert plain["parameters"] == pytest.approx(2 * parameters, rel=0.01)
    assert plain["optimizer_state"] == pytest.approx(12 * parameters, rel=0.01)
    tokens = 4 * 1024
    kept = 24 * (tokens * 2048 * 34 + 5 * tokens * 1024 * 16)  # Korthikanti et al. 2022, equation 1
    slack = book().memory(job(workload(row()), book()).stack)["activation_slack"]
    assert plain["activations"] == pytest.approx(kept * slack, rel=0.02)


def test_zero_and_recomputation_take_memory_away():
    peaks = [sum(held(row(parallel__zero_stage=stage)).values()) for stage in (0, 1, 2, 3)]
    assert peaks == sorted(peaks, reverse=True)
    kinds = [sum(held(row(parallel__recompute=kind)).values()) for kind in ("none", "selective", "full")]
    assert kinds == sorted(kinds, reverse=True)


def test_generations_of_devices():
    assert [kind_of(name) for name in ("B200", "GB300", "GH200-96GB")] == ["B200", "GB300", "GH200"]
    known = book()
    older, newer = (set(known.effects(known.stack("NeMo 26.02"), kind)) for kind in ("GB200", "GB300"))
    assert older ^ newer == {("", "GB200"), ("", "GB300")}  # the software is taken as the same on both


def test_a_device_that_may_draw_more_power_multiplies_faster_at_the_same_peak():
    rates = [read(name).hosts[0].device.flops_per_second for name in ("gb200-nvl72", "gb300-nvl72")]
    for precision in ("bf16", "fp8"):
        assert rates[1][precision] / rates[0][precision] == pytest.approx(1400 / 1200, rel=1e-3)


def test_numbers_of_four_bits_are_rounded_in_passes_of_their_own_and_hide_no_collectives():
    split = {"model__heads": 16, "parallel__tp": 2, "parallel__dp": 2, "hardware__num_gpus": 4, "batch__micro": 1}
    split |= {"software": "NeMo 26.04", "hardware__gpu": "GB200", "batch__grad_accum": 8, "parallel__recompute": None}
    split |= {"parallel__seq_parallel": True}
    eight, four = (job(workload(row(**split, precision=said)), book()) for said in ("MXFP8", "NVFP4"))
    passes = [(made.layers[0][1].forward.moved, made.layers[0][1].backward.moved) for made in (eight, four)]
    tokens, hidden, ffn = 1024, 2048, 8192
    forward = 6 * tokens * (hidden + hidden / 2 + hidden + ffn / 2)  # what enters four products
    backward = 6 * tokens * (3 * hidden / 2 + hidden + ffn / 2 + hidden)  # what comes back from them
    assert passes[1][0] - passes[0][0] == pytest.approx(forward)
    assert passes[1][1] - passes[0][1] == pytest.approx(backward)
    constants = dataclasses.replace(book().expected(), exposed_tensor=0.25, intra_seconds=1e-12)
    shown = [seconds(made, constants, {})["tensor"] for made in (eight, four)]
    assert shown[0] / shown[1] == pytest.approx(0.25, rel=0.01)


def test_fp32_convolutions_of_3_x_3_take_fewer_multiplications():
    images = {"model": {"family": "cnn", "name": "VGG16"}, "batch": {"global": 64, "micro": 16}, "precision": "fp32"}
    plain = {**images, "model": {"family": "cnn", "name": "EfficientNet-B0"}}
    shares = [
        priced(row(**each))["matmul"] * 16e12 / (3 * flops * 16) for each, flops in ((images, 31e9), (plain, 0.78e9))
    ]
    assert shares[0] < 0.6 * shares[1]


def test_stages_of_split_layers_send_shards_and_gather_them():
    split = {"parallel__tp": 8, "parallel__pp": 4, "parallel__dp": 1, "hardware__num_gpus": 32}
    made = job(workload(row(**split)), book())
    whole = dataclasses.replace(made, stack=dataclasses.replace(made.stack, scatter=False))
    constants = made.book.constants(made.stack, made.kind)
    assert made.stack.scatter
    assert 0.05 < seconds(made, constants, {})["transfer"] / seconds(whole, constants, {})["transfer"] < 0.7


def forward_bytes(changed, **facts):
    made = job(workload(changed), book())
    return layer(made.work, dataclasses.replace(made.stack, **facts), made.kernels).forward.moved


def test_scores_move_more_where_megatrons_kernel_for_scale_mask_and_softmax_does_not_take_them():
    twos = {"batch__micro": 1, "batch__grad_accum": 16, "parallel__tp": 8, "parallel__dp": 4, "hardware__num_gpus": 32}
    long = {"model__seq": 4096, "batch__micro": 1, "batch__grad_accum": 16}
    cases = [
        ({}, 0),
        ({"precision": "fp32"}, 16 * 4 * 16 * 1024**2),
        (twos, 32 * 2 * 1024**2),
        (long, 32 * 16 * 4096**2),
    ]
    for changes, more in cases:
        known, one = (forward_bytes(row(**changes), fused_in_halves=fused) for fused in (True, False))
        assert known - one == pytest.approx(more)


def test_operations_in_kernels_of_their_own_move_more():
    tokens = 4 * 1024
    more = forward_bytes(row(), apart=True, fused_in_halves=False) - forward_bytes(row(), fused_in_halves=False)
    assert more == pytest.approx(2 * tokens * (23 * 2048 + 2 * 8192 + 4 * 16 * 1024))


def test_cards_without_peer_access_share_their_way_through_the_host():
    known = {name: read(f"{name}-8").intra.bytes_per_second for name in ("titan-rtx", "rtx2080", "rtx3090")}
    assert known["titan-rtx"] == known["rtx2080"] == known["rtx3090"] / 2


def test_only_projections_from_low_ranks_run_again_where_a_recipe_says_so():
    model = {"family": "moe", "name": "DeepSeekV3", "layers": 61, "hidden": 7168, "heads": 128, "head_dim": 128}
    model |= {
        "ffn": 18432,
        "vocab": 129280,
        "seq": 4096,
        "glu": True,
        "experts": 256,
        "experts_topk": 8,
        "moe_ffn": 2048,
    }
    changes = {"model": model | {"attention": "MLA causal"}, "parallel__recompute": None, "precision": "MXFP8"}
    changes |= {"software": "NeMo 26.02", "hardware__gpu": "GB200", "parallel__ep": 4}
    again = job(workload(row(**changes)), book()).layers[1][1].again
    flops = 2 * 4 * 4096 * (1536 * 128 * (128 + 64) + 512 * 128 * 2 * 128)  # queries, and keys and values
    assert flops < again.product < 1.2 * flops
    newest = job(workload(row(**changes | {"software": "NeMo 26.06", "hardware__gpu": "GB300"})), book())
    assert newest.layers[1][1].again.product == 0
    assert newest.stack.sends_beside
