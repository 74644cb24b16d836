"""What an optimizer in the hosts' memory takes and spares, as the executor has it, and when it is proposed."""

from dataclasses import replace

import made
import pytest
from tiny import tiny

from sheaf.cluster import read
from sheaf.cost import price
from sheaf.cost.basis import Basis
from sheaf.cost.memory import MARGIN, host_bytes, memory, needed_bytes
from sheaf.cost.offload import COPY_BYTES_PER_SECOND, HOST_COPIES, UPDATE_BYTES_PER_SECOND
from sheaf.cost.pipeline import kept_stages, workers
from sheaf.cost.portion import Portion
from sheaf.graph import trace
from sheaf.plans import Plan
from sheaf.search import Question, search
from sheaf.search.rules import too_large

PARAMETERS = 4 * 250_000 * 4  # bytes of made.facts()
SIZES = [4] * 8


def priced(text: str, cluster=None):
    return price(Plan.parse(text), made.facts(), cluster or made.cluster(), None, microbatches=SIZES)


def on_cpus(**changes):
    there = made.cluster(**changes)
    device = replace(there.hosts[0].device, kind="cpu")
    return replace(there, backend="gloo", hosts=tuple(replace(host, device=device) for host in there.hosts))


@pytest.mark.parametrize(
    ("text", "share"), [("serial", 1), ("dp=4", 1), ("dp=4,zero=1", 4), ("dp=2,zero=3", 2), ("pp=4", 4)]
)
def test_state_leaves_the_device_and_copies_and_the_hosts_update_are_paid(text, share):
    here = priced(text)
    there = priced("offload=optimizer" if text == "serial" else f"{text},offload=optimizer")
    assert {**here.memory, "optimizer_state": 0} == there.memory
    assert here.memory["optimizer_state"] == 2 * PARAMETERS // share
    assert (here.host_bytes, there.host_bytes) == (0, (2 + HOST_COPIES) * PARAMETERS // share)
    stepped = PARAMETERS / share
    assert there.seconds["offload"] == pytest.approx(2 * stepped / COPY_BYTES_PER_SECOND)
    # gradient, value and both moments read, value and moments written; all workers of the host at once
    assert there.seconds["optimizer"] == pytest.approx(7 * stepped * there.plan.workers / UPDATE_BYTES_PER_SECOND)
    kept = set(here.seconds) - {"offload", "optimizer"}
    assert {term: here.seconds[term] for term in kept} == {term: there.seconds[term] for term in kept}


def test_what_a_host_says_of_itself_counts():
    there = made.cluster()
    host = replace(there.hosts[0], offload_bytes_per_second=48e9, update_bytes_per_second=400e9)
    fast, slow = (priced("dp=2,offload=optimizer", one) for one in (replace(there, hosts=(host,)), there))
    assert slow.seconds["offload"] / fast.seconds["offload"] == pytest.approx(4)
    assert slow.seconds["optimizer"] / fast.seconds["optimizer"] == pytest.approx(4)
    assert read("h100-dgx").hosts[0].offload_bytes_per_second > COPY_BYTES_PER_SECOND


def test_on_cpus_both_memories_are_the_same():
    here, there = (priced(text, on_cpus()) for text in ("dp=2", "dp=2,offload=optimizer"))
    assert there.host_bytes == 0
    assert there.peak_bytes == here.peak_bytes + HOST_COPIES * PARAMETERS
    assert there.seconds["optimizer"] == pytest.approx(here.seconds["optimizer"])
    assert there.seconds["offload"] > 0


def held(task, plan: str) -> int:
    """Bytes that the executor has in the host's memory after a step, counters apart."""
    from sheaf.parallel import build

    step = build(task, Plan.parse(plan))
    step()
    stepped = [one for group in step.optimizer.param_groups for one in group["params"]]
    state = [value for one in stepped for value in step.optimizer.state[one].values() if value.ndim]
    found = sum(one.nbytes + one.grad.nbytes for one in stepped) + sum(value.nbytes for value in state)
    step.close()
    return found


def test_the_host_holds_what_is_priced(ranks):
    import torch

    task = replace(tiny(), optimizer=torch.optim.AdamW)
    facts = Portion(trace(task, 3), None)
    for plan, count in (("offload=optimizer", 1), ("dp=2,zero=1,offload=optimizer", 2)):
        found = ranks(held, count, task, plan)
        assert max(found) == pytest.approx(host_bytes(Plan.parse(plan), facts, None), rel=0.02)  # padding


def asked(cluster, **changes) -> Question:
    return Question(batch=32, facts={4: made.facts()}, cluster=cluster, microbatch=4, **changes)


def test_a_host_without_room_is_told_of():
    there = made.cluster(2)
    small = replace(there, hosts=(replace(there.hosts[0], memory_bytes=24_000_000),))
    held = asked(small).held(Plan.parse("dp=2,offload=optimizer"))
    assert held.host_bytes * MARGIN > 12_000_000
    why = too_large(held, small)
    assert why is not None
    assert "of the memory of host0 for each worker, 11.4 MiB are its share; offload keeps optimizer state" in why
    assert too_large(held, there) is None


def test_it_is_proposed_where_a_plan_does_not_fit_and_the_optimizer_can():
    room = needed_bytes(asked(made.cluster(1)).held(Plan.parse("offload=optimizer")).peak_bytes, "cuda")
    small = made.cluster(1, memory_bytes=room)
    plain = search(asked(made.cluster(1)))
    assert not any("offload" in str(entry.plan) for entry in plain.ranked)
    found = search(asked(small))
    assert str(found.best.plan) == "offload=optimizer"
    refused = next(one for one in found.refused if one.plan == "serial")
    assert "optimizer state takes" in refused.reason
    assert "offload=optimizer" in [one.plan for one in refused.remedies]
    assert not search(asked(small, hosted=False)).ranked
    assert found.best.plan not in [entry.plan for entry in plain.ranked]
    cpus = on_cpus(workers=1, memory_bytes=2**30)
    cpus = replace(cpus, hosts=(replace(cpus.hosts[0], memory_bytes=room),))
    assert not search(asked(cpus)).ranked


def test_the_host_that_steps_slowest_is_waited_for_wherever_it_stands():
    there = made.cluster(1)
    fast = there.hosts[0]
    slow = replace(fast, name="slow", offload_bytes_per_second=1e9, update_bytes_per_second=10e9)
    for text in ("dp=2", "dp=2,zero=1", "pp=2"):
        found = [
            priced(f"{text},offload=optimizer", replace(there, hosts=hosts)) for hosts in ((fast, slow), (slow, slow))
        ]
        alike = priced(f"{text},offload=optimizer").seconds
        assert found[0].step_seconds == pytest.approx(found[1].step_seconds), text
        if text == "dp=2":  # nobody waits for its update, but for what it computes after it
            assert found[0].seconds["offload"] == pytest.approx(alike["offload"])
            assert found[0].seconds["wait"] > alike["wait"]
        else:
            assert found[0].seconds == pytest.approx(found[1].seconds), text
            assert found[0].seconds["offload"] > alike["offload"], text


def test_on_cpus_the_fullest_of_a_pipeline_has_what_it_steps_itself():
    """The first stage keeps most for backward, the last has most to step."""
    even, plan, cpus = made.facts(4), Plan.parse("pp=4,offload=optimizer"), on_cpus(workers=4)
    *others, last = even.parameters
    facts = replace(even, parameters=(*others, replace(last, shape=(400_000,))))
    parts = workers(plan, Basis.of(plan, facts, None, cpus))
    here = [
        sum(memory(plan, part, None, SIZES, kept=kept).values())
        for part, kept in zip(parts, kept_stages(plan, len(SIZES)), strict=True)
    ]
    there = [host_bytes(plan, part, None) for part in parts]
    found = price(plan, facts, cpus, None, microbatches=SIZES).peak_bytes
    assert found == max(map(sum, zip(here, there, strict=True))) < max(here) + max(there)
