"""Plans with a parameter server, on real workers: the serial answer in lock-step, honest reports otherwise."""

import math
import threading
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from counting import SHARE, counted, counting, samples_of
from plain import assert_same, mlp_float64, norm_resnet, plain, planned, ragged_gpt
from server_cases import in_one_go
from torch import nn

from sheaf.errors import NonFiniteLoss, PlanError
from sheaf.parallel import build, refuse
from sheaf.plans import Plan
from sheaf.task import Loss


@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        ("dp=2,server=2", {}),
        ("dp=3,server=2,shares=2:1:1", {"clip": 0.05}),
        ("dp=3,server=2,shares=stolen", {"clip": 0.05}),
        ("dp=2,server=1,shares=stolen", {}),
        ("dp=2,server=1", {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)}),
        ("dp=2,server=2:apart", {"clip": 0.05}),
        ("dp=2,server=1:apart", {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)}),
        ("dp=2,server=2:apart,shares=stolen", {}),
    ],
)
def test_lock_step_is_the_serial_answer(ranks, plan, changes):
    task = mlp_float64(**changes)
    found = ranks(planned, Plan.parse(plan).workers, task, plan, 5)[0]
    assert_same(found, plain(task, 5), 1e-12)


@pytest.mark.parametrize("plan", ["dp=2,server=2", "dp=2,server=2:apart"])
@pytest.mark.parametrize("task", [ragged_gpt, norm_resnet])
def test_lock_step_with_ties_dropout_clip_schedule_and_batch_statistics(ranks, task, plan):
    task = task(precision="fp64")
    found = ranks(planned, Plan.parse(plan).workers, task, plan, 3)[0]
    assert_same(found, plain(task, 3), 1e-9)


def relaxed(task, plan, steps, stop_after=None):
    """Every worker's reports, its shards' updates, and the whole weights."""
    step = build(task, Plan.parse(plan))
    reports = []
    while step.index < steps and not (reports and reports[-1].stop):
        if stop_after is not None and step.index == (stop_after, stop_after + 20)[step.rank == 0]:
            asked = dist.distributed_c10d._get_default_store()
            if step.rank == 1:
                step.request_stop()
                asked.set(f"asked for a stop in {plan}", "")
            else:  # without a bound it could be done before the other has asked
                asked.wait([f"asked for a stop in {plan}"])
        reports.append(step())
    whole = step.full_state()
    for host in step.hosts:
        host.wait_for_clock(step.index, 20)
    updates = {host.shard.number: host.shard.version for host in step.hosts if host.seat == "primary"}
    step.close()
    return reports, updates, {name: value.clone() for name, value in whole.items()}


@pytest.mark.parametrize(
    ("plan", "bound", "updates"),
    [
        ("dp=2,server=2:async", math.inf, 20),
        ("dp=2,server=1:staleness=1", 1, 20),
        ("dp=2,server=2:staleness=2,late=scaled", 2, 20),
        ("dp=2,server=2:async,late=compensated", math.inf, 20),
        ("dp=2,server=2:staleness=3,late=buffered", 3, 10),
    ],
)
def test_behind_by_no_more_than_allowed_it_still_learns(ranks, plan, bound, updates):
    task = mlp_float64(clip=5.0, batch=15)
    found = ranks(relaxed, 2, task, plan, 10)
    for reports, versions, _ in found:
        assert len(reports) == 10
        assert max(report.server["staleness"] for report in reports) <= bound
        assert reports[-1].server["staleness_max"] == max(report.server["staleness"] for report in reports)
        assert all(report.server["sent_bytes"] > 0 and report.gradient_norm > 0 for report in reports)
        assert set(versions.values()) <= {updates}
        # a report has this worker's own part at least, and never more than the step has
        assert all(0 < report.samples <= task.batch and math.isfinite(report.loss) for report in reports)
    whole, first = found[0][2], plain(task, 1).weights[0]
    assert set(first) <= set(whole)
    assert found[1][2] == {}
    assert any(not torch.equal(whole[name], first[name]) for name in first)


def test_too_late_a_gradient_is_dropped_and_its_samples_are_used_again(ranks):
    found = ranks(relaxed, 2, mlp_float64(batch=15), "dp=2,server=2:async,late=plain:0", 8)
    for reports, versions, _ in found:
        assert len(reports) == 8
        assert set(versions.values()) <= {16}  # every step of every worker counts once, in the end
        assert all(report.server["delay"] == 0 for report in reports)


def test_all_workers_stop_after_the_same_step(ranks):
    for plan in ("dp=2,server=2", "dp=2,server=1:async"):
        (first, _, _), (second, _, _) = ranks(relaxed, 2, mlp_float64(), plan, 50, 3)
        assert first[-1].stop
        assert second[-1].stop
        assert first[-1].step == second[-1].step < 49
        if plan == "dp=2,server=2":
            assert first[-1].step == 3


def resumed(task, plan):
    """Five steps in one go; and two, then three more by another step that was given the state."""
    straight, losses, kept, wanted = in_one_go(task, plan, 5)
    other = build(task, Plan.parse(plan))
    other()
    other.load(*kept)
    again = [other().loss for _ in range(3)]
    found = {name: value.clone() for name, value in other.full_state().items()}
    backups = [host.shard.version for host in other.hosts]
    straight.load(*kept)  # and behind, by the very step that made it
    third = [straight().loss for _ in range(3)]
    straight.close()
    other.close()
    return losses, again, third, wanted, found, backups


def test_a_resumed_run_is_the_same_to_the_last_bit(ranks):
    task = replace(ragged_gpt(), precision="fp32")
    for losses, again, third, wanted, found, backups in ranks(resumed, 2, task, "dp=2,server=2"):
        assert losses[2:] == again == third
        assert set(wanted) == set(found)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert set(backups) == {3}  # a shard and another's backup, both from the checkpoint on


def test_a_loss_that_is_no_number_is_named_everywhere_and_nothing_is_applied(ranks):
    def bad(output, batch):
        total = output.sum()
        return Loss(total * math.inf if len(batch[0]) < 3 else total, len(batch[0]))

    def run(task, plan):
        step = build(task, Plan.parse(plan))
        before = {name: value.clone() for name, value in step.full_state().items()}
        with pytest.raises(NonFiniteLoss) as caught:
            step()
        after = step.full_state()
        step.close()
        return (
            caught.value.step,
            caught.value.microbatch,
            all(torch.equal(after[name], before[name]) for name in before),
        )

    task = mlp_float64(loss=bad)  # the last of 14 samples in microbatches of 3 is one of 2
    assert ranks(run, 2, task, "dp=2,server=2") == [(0, 4, True)] * 2


@pytest.mark.parametrize(
    ("plan", "changes", "messages"),
    [
        (
            "dp=9,server=9",
            {
                "precision": "fp16",
                "optimizer": torch.optim.Adafactor,
            },
            ["9 shards for 6 trained parameters: use at most server=6", "use bf16 or fp32", "Adafactor needs more"],
        ),
        (
            "dp=2,server=2",
            {"optimizer": lambda given: torch.optim.SparseAdam(list(given))},
            ["and SparseAdam needs more"],
        ),
        ("dp=2,server=2:async,late=delayed", {}, ["momentum=0.9, nesterov=True), or late=buffered"]),
        (
            "dp=2,server=2:async",
            {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
            ["ReduceLROnPlateau looks at the loss of all workers"],
        ),
    ],
)
def test_what_a_shard_cannot_run_is_refused_before_anything_starts(plan, changes, messages):
    with pytest.raises(PlanError) as caught:
        refuse(mlp_float64(**changes), Plan.parse(plan))
    for message in messages:
        assert message in str(caught.value)
    assert len(caught.value.broken) == len(messages)


def test_embeddings_lie_on_shards_by_rows():
    from sheaf.parallel.server.assemble import forms_of

    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3))
    found = forms_of(model, dict(model.named_parameters()), 3)
    rows = [(piece.start // 6, piece.stop // 6) for form in found for piece in form.pieces if piece.name == "0.weight"]
    assert rows == [(0, 4), (4, 7), (7, 10)]


def test_stolen_shares_refuse_statistics_that_need_everyone():
    with pytest.raises(PlanError, match=r"keeps running statistics, .* use dealt shares"):
        refuse(norm_resnet(), Plan.parse("dp=2,server=1,shares=stolen"))
    refuse(mlp_float64(), Plan.parse("dp=2,server=1,shares=stolen"))


def far(task, plan, steps):
    """Steps of a worker that is far slower than the other in the middle of the run: what it reports."""
    import time

    from sheaf.parallel.server.work import Paces

    bound = Paces.bound_seconds
    Paces.bound_seconds = lambda self, worker: (
        bound(self, worker) if worker else 1000.0
    )  # nobody goes on without the first
    try:
        step = build(task, Plan.parse(plan))
        found = []
        while step.index < steps:
            if step.rank == 1 and step.index == 2:
                time.sleep(0.6)
            found.append(step())
        step.close()
    finally:
        Paces.bound_seconds = bound
    return found


def test_a_worker_that_the_others_went_on_without_reports_the_step_where_they_are(ranks):
    whole, slow = ranks(far, 2, mlp_float64(), "dp=2,server=2,shares=stolen", 12)
    assert [report.step for report in whole] == list(range(12))
    missed = [report.server["missed"] for report in slow]
    assert sum(missed) + len(slow) == 12
    assert slow[-1].step == 11
    told = {report.step: (report.loss, report.weight, report.samples) for report in whole}
    assert all(told[report.step] == (report.loss, report.weight, report.samples) for report in slow)
    assert all(sum(report.microbatches) == -(-report.samples // 3) for report in whole)
    assert all(len(report.computed) == 2 for report in whole)


@pytest.mark.thinned(3)
@pytest.mark.whole
@pytest.mark.parametrize("name", ["mlp", "gpt", "transformer_seq2seq"])
def test_verify_finds_lock_step_exact(name):
    import sheaf
    from sheaf.zoo.tasks.small import SMALL

    plans = {"gpt": "dp=2,server=2,shares=stolen", "transformer_seq2seq": "dp=2,server=2:apart"}
    plan = plans.get(name, "dp=2,server=2")
    assert sheaf.verify(SMALL[name](), plan, steps=2).verdict in ("identical", "rounding")


@pytest.mark.whole
def test_verify_never_calls_staleness_exact():
    import sheaf
    from sheaf.zoo.tasks.small import SMALL

    verdict = sheaf.verify(SMALL["mlp"](), "dp=2,server=1:staleness=2", steps=2)
    assert verdict.verdict == "relaxed"
    assert not verdict.exact


def left_behind(plan):
    """Five steps of a worker, of which the other is given up after its second; what it reports when it is back."""
    step = build(counting(), Plan.parse(plan))
    reports = [step() for _ in range(2)]
    dist.barrier()
    for host in step.hosts:
        host.lose(1)
    dist.barrier()
    if step.rank == 0:
        reports += [step() for _ in range(3)]
    dist.barrier()
    if step.rank == 1:
        reports.append(step())
    dist.barrier()
    whole = {name: value.clone() for name, value in step.full_state().items()}
    step.close()
    return [(report.step, report.samples, report.server) for report in reports], whole


def test_a_worker_that_was_given_up_finds_its_share_taken_and_computes_another(ranks):
    (first, whole), (second, _) = ranks(left_behind, 2, "dp=2,server=2:async")
    step, _, back = second[-1]
    assert (step, back["missed"], back["dropped"], back["returned"]) == (4, 2, 1, 1)
    assert [step for step, _, _ in first] == list(range(5))
    assert {samples % SHARE for _, samples, _ in (*first, *second)} == {0}
    parts = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1), (3, 0), (4, 1)]  # the other has (3, 1) now
    assert counted(whole["table.weight"]) == samples_of(parts)


def threads_left(task, plan):
    """The names of threads that were not there before a run of two steps, and are there after it."""
    before = set(threading.enumerate())
    step = build(task, Plan.parse(plan))
    for _ in range(2):
        step()
    step.close()
    return [one.name for one in threading.enumerate() if one not in before]


@pytest.mark.parametrize(
    "plan",
    [
        "dp=3,server=3",
        "dp=2,server=2,shares=stolen",
        "dp=2,server=2:apart:staleness=1",
        "dp=2,server=1:async,local=2",
        "dp=2,tp=2,server=2:async",
    ],
)
def test_no_thread_outlives_its_step(ranks, plan):
    """One in torch's C++ when Python ends aborts the process."""
    found = ranks(threads_left, Plan.parse(plan).workers, mlp_float64(), plan)
    assert found == [[]] * len(found)
