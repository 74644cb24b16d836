"""A model whose training state exceeds what one worker may hold is planned for several, and trains there."""

from pathlib import Path

import made
import pytest
import torch
from torch.nn import functional as F

import sheaf
from sheaf import launch
from sheaf.errors import WorkerFailed
from sheaf.plans import Plan

WORKER_BYTES = 240 * 2**20
OWN_BYTES = 220 * 2**20


def large() -> sheaf.Task:
    """19 million parameters: weights, gradients and AdamW's moments are 287 MiB."""
    from sheaf.zoo.models import GPT

    data = torch.randint(0, 6000, (16, 9), generator=torch.Generator().manual_seed(0))
    return sheaf.Task(
        model=lambda: GPT(vocabulary=6000, context=8, width=384, layers=8, heads=8, dropout=0.0, tied=False),
        loss=lambda output, batch: F.cross_entropy(output.flatten(0, 1), batch[:, 1:].flatten()),
        inputs=lambda batch: (batch[:, :-1],),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        data=data,
        batch=8,
        microbatch=2,
    )


def steps(plan: str) -> list[float]:
    """Losses of two steps on this worker, which may take no more than OWN_BYTES beside what it holds already."""
    import resource

    from sheaf.parallel import build

    torch.set_num_threads(1)
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + OWN_BYTES, resource.RLIM_INFINITY))
    step = build(large(), Plan.parse(plan))
    return [step().loss for _ in range(2)]


@pytest.mark.timeout(600)  # it starts workers twice, and the machine may be busy
def test_the_planner_finds_a_plan_for_it_and_it_trains_where_one_worker_cannot():
    cluster = made.cluster(workers=1, hosts=4, memory_bytes=WORKER_BYTES)
    ranking = sheaf.plan(large(), cluster=cluster)
    refused = {refusal.plan: refusal.reason for refusal in ranking.refused}
    assert "MiB" in refused["serial"]
    assert any(entry.plan.tp > 1 or entry.plan.pp > 1 for entry in ranking.ranked)
    with pytest.raises(WorkerFailed, match="allocate"):
        launch.run(steps, 1, "serial", timeout_s=200)
    chosen = next(entry.plan for entry in ranking.ranked if entry.plan.tp > 1 or entry.plan.pp > 1)
    found = launch.run(steps, chosen.workers, str(chosen), timeout_s=200)
    assert all(losses == pytest.approx(found[0]) for losses in found)
    assert found[0][0] == pytest.approx(8.7, abs=0.2)
