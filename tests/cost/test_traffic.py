"""What a worker hands to the network under each plan: as the kernel counts it, as the record says, as was predicted."""

import os
import socket
import struct
import sys
import time
from dataclasses import replace

import made
import pytest
import torch.distributed as dist

from sheaf.cluster.traffic import Traffic
from sheaf.cost import microbatch_sizes, price
from sheaf.graph import trace
from sheaf.parallel import build, refuse
from sheaf.plans import Plan
from sheaf.zoo.tasks import text_gpt, volumes

PLANS = (
    "dp=2",
    "dp=3,zero=1",
    "dp=2,zero=2",
    "dp=2,zero=3",
    "tp=2",
    "dp=2,tp=2",
    "tp=2,sequence=1",
    "pp=2",
    "pp=4",
    "dp=2,pp=2",
    "dp=2,head=tp",
    "dp=2,blocks.3=tp",
    "dp=2,tokens=sparse",
    "dp=3,tokens=rows",
    "dp=3,tokens=rows,positions=sparse,head=tp",
    "dp=2,server=1",
    "dp=2,server=2",
    "dp=3,server=2",
    "dp=2,server=2:async",
    "dp=2,local=2",
    "dp=2,local=4:diloco:fragments=2",
    "dp=3,local=2:ring",
    "dp=2,local=2:adasum",
    "dp=2,compress=bf16",
    "dp=2,compress=int8",
    "dp=2,compress=topk:0.1",
    "dp=2,compress=powersgd:8",
    "dp=4,compress=powersgd:2",
    "dp=2,local=2:diloco,compress=int8",
)
SENT_OFFSET, INFO_BYTES = 200, 280  # of tcpi_bytes_sent in Linux's struct tcp_info; tcpi_bytes_retrans follows
NEAR = 0.05
QUIET_BYTES = 1000  # less than that in 20 ms, and only heartbeats are under way


def task(text):
    """Small, but with activations that are large beside what stages tell each other of them, and weights that are
    beside what a worker asks while it waits for a meeting.
    """
    context, width = 128 if "pp=" in text else 32, 128 if "quorum" in text else 64
    return text_gpt(batch=16, microbatch=2, context=context, width=width, layers=4, heads=4, dropout=0.0, tied=False)


def kernel_bytes():
    """By connection of this process to another: the bytes that TCP has sent, once, headers apart."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as line:
                if line.type == socket.SOCK_STREAM and line.family in (socket.AF_INET, socket.AF_INET6):
                    ends = line.getsockname()[:2], line.getpeername()[:2]
                    told = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_BYTES)
                    sent, again = struct.unpack_from("QQ", told, SENT_OFFSET)
                    found[ends] = sent - again  # a busy machine sends some twice
        except OSError:  # closed meanwhile, or one that listens
            continue
    return {(here, there): size for (here, there), size in found.items() if (there, here) not in found}


def settled():
    """What the kernel has sent, once nothing is under way any more."""
    dist.barrier()
    counted, quiet = kernel_bytes(), 0
    while quiet < 5:  # beats of a server go on
        time.sleep(0.02)
        before, counted = counted, kernel_bytes()
        quiet = quiet + 1 if sum(counted.values()) - sum(before.values()) < QUIET_BYTES else 0
    dist.barrier()  # nobody closes a connection before all have counted
    return counted


def sent(text, steps):
    """Bytes per step on this worker: by the kernel, and as they are told in its reports.

    A shard may send what it has to after its worker's step has ended, and rows are pulled ahead: that is in no report.
    """
    from sheaf.cluster.traffic import traffic  # the rank's own, not a copy that came with this function

    step = build(task(text), Plan.parse(text))
    step()
    step()
    before, told_before = settled(), traffic.sent_bytes
    reports = [step() for _ in range(steps)]
    after, told = settled(), traffic.sent_bytes - told_before
    step.close()
    counted = sum(size - before.get(ends, 0) for ends, size in after.items())
    reported = sum(report.sent_bytes for report in reports)
    between = "server" in text or "=rows" in text
    near = pytest.approx(told)  # thirds of what earlier tests sent are in both sums
    assert 0 < reported <= told * (1 + 1e-6) if between else reported == near
    return counted / steps, told / steps


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count is Linux's")
@pytest.mark.thinned(6)
@pytest.mark.parametrize("text", PLANS)
def test_what_is_sent_is_what_is_told_and_was_predicted(ranks, text):
    plan, given = Plan.parse(text), task(text)
    found = ranks(sent, plan.workers, text, 2 * max(1, plan.meets_locally.every))
    busiest = max(kernel for kernel, _ in found)
    for kernel, told in found:
        if kernel > busiest / 2:  # others send little but what all are told each step, and its headers
            assert told == pytest.approx(kernel, rel=NEAR)
    sizes = microbatch_sizes(given.batch, given.microbatch)
    facts, split = trace(given, given.microbatch), refuse(given, plan)
    cluster = replace(made.cluster(plan.workers), backend="gloo")
    promised = price(plan, facts, cluster, None, microbatches=sizes, split=split)
    assert promised.traffic_bytes == pytest.approx(busiest, rel=NEAR)


def own_store(step):
    """What meetings are agreed through, beside worker 0 as in a run: the pool has its own in another process."""
    told = [None]
    if step.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        told[0] = store.port
    dist.broadcast_object_list(told)
    step._board._store = store if step.rank == 0 else dist.TCPStore("127.0.0.1", told[0], is_master=False)


def sent_with_some_late(text, late):
    """Bytes on this worker over as many meetings as ``late`` says who is late for which: by the kernel, and as told."""
    from sheaf.cluster.traffic import traffic  # the rank's own

    step = build(task(text), Plan.parse(text))
    own_store(step)
    opened, meet, came = step._open, step._meet, []

    def begun_by_all(meeting):
        opened(meeting)
        dist.barrier()  # nobody misses what comes next

    def come(meeting, *given):
        while step.rank in late[meeting] and step._board.closed(meeting) is None:
            time.sleep(0.05)
        closed, norm = meet(meeting, *given)
        came.append(tuple(worker for worker in range(step.workers) if worker not in closed.told))
        return closed, norm

    step._open, step._meet = begun_by_all, come
    before, told_before = settled(), traffic.sent_bytes
    for _ in range(step.plan.meets_locally.every * len(late)):
        step()
    step.state()  # whoever was late for the last meeting asks for its outcome, as the next step would
    after, told = settled(), traffic.sent_bytes - told_before
    step.close()
    assert came == list(late)
    return sum(size - before.get(ends, 0) for ends, size in after.items()), told


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count is Linux's")
@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("text", "late"),
    [
        ("local=2:quorum=3", [(3,), (3,), (3,)]),
        ("local=2:quorum=3", [(0,), (1,), (0,)]),
        ("local=2:diloco:quorum=2", [(2, 3), (0, 1), (0, 3)]),
        ("local=2:quorum=1:late=drop", [(1, 2, 3), (0, 1, 2)]),
        ("local=1:backup:quorum=3", [(1,), (0,), (3,)]),
        ("local=1:backup:quorum=2", [(0, 1), (0, 2), (2, 3)]),
    ],
)
def test_all_together_send_what_was_predicted_whoever_is_late(ranks, text, late):
    plan, given = Plan.parse(f"dp=4,{text}"), task(text)
    found = ranks(sent_with_some_late, 4, str(plan), late)
    steps = plan.meets_locally.every * len(late)
    kernel, told = (sum(one) / 4 / steps for one in zip(*found, strict=True))
    sizes, facts = microbatch_sizes(given.batch, given.microbatch), trace(given, given.microbatch)
    cluster = replace(made.cluster(4), backend="gloo")
    promised = price(plan, facts, cluster, None, microbatches=sizes).traffic_bytes
    assert (told, kernel) == (pytest.approx(promised, rel=NEAR), pytest.approx(promised, rel=NEAR))


def test_a_line_to_oneself_does_not_count():
    counted = Traffic()
    counted.collective("all_reduce", 1000, 4)
    counted.message(10)
    counted.line(("a", "b"), 100)
    assert counted.sent_bytes == 1500 + 10 + 100
    counted.line(("b", "a"), 7)
    assert counted.sent_bytes == 1500 + 10


def skipping():
    """A U-Net: what its way down computes is used again on its way up."""
    return volumes(side=8, widths=(4, 8, 12), batch=8, microbatch=2)


def told_by(text):
    step = build(skipping(), Plan.parse(text))
    reports = [step() for _ in range(3)]
    step.close()
    return reports[-1].sent_bytes


@pytest.mark.parametrize("text", ["pp=2", "pp=3"])
def test_what_skips_over_blocks_crosses_between_stages_too(ranks, text):
    plan, given = Plan.parse(text), skipping()
    facts = trace(given, given.microbatch)
    cluster = replace(made.cluster(plan.workers), backend="gloo")
    sizes = microbatch_sizes(given.batch, given.microbatch)
    promised = price(plan, facts, cluster, None, microbatches=sizes).traffic_bytes
    assert promised == pytest.approx(max(ranks(told_by, plan.workers, text)), rel=NEAR)
