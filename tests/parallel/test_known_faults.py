"""Faults of the parts that Sheaf stands on, seen on torch 2.13, and that Sheaf does not have them."""

from dataclasses import replace

import torch
from plain import assert_same, mlp_float64, plain, planned, ragged_gpt
from torch import Tensor, nn


def test_unequal_token_counts_weigh_as_in_one_process(ranks):
    """DDP averages each rank's mean: with ragged counts that is another gradient."""

    def averaged_means() -> float:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        from sheaf.task import Order
        from sheaf.task.blueprint import Blueprint

        model = DistributedDataParallel(Blueprint(task).fill(torch.device("cpu")))
        mine = Order(26, 4, 2, 0, shuffle=True).step(0)[dist.get_rank()]
        batch = task.collate([task.data[index] for index in mine.samples])
        loss = task.loss(model(batch[:, :-1]), batch)
        (loss.sum / loss.weight).backward()
        return float(model.module.tokens.weight.grad.norm())

    from sheaf.zoo.models.gpt import GPT

    quiet = lambda: GPT(vocabulary=41, context=16, width=24, layers=1, heads=3, dropout=0.0, padding=40)  # noqa: E731
    task = ragged_gpt(model=quiet, batch=4, microbatch=2, clip=None)
    wanted = plain(task, 1)
    norm = float(wanted.gradients[0]["tokens.weight"].norm())
    assert abs(ranks(averaged_means, 2)[0] - norm) > 1e-3 * norm
    assert_same(ranks(planned, 2, task, "dp=2", 1)[0], wanted, 1e-5)


def test_workers_draw_different_dropout_masks_and_the_ones_one_process_draws(ranks):
    """DTensor dropout on a CPU shard draws the same mask on every rank."""

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.out = nn.Dropout(0.5), nn.Linear(12, 5)
            self.seen: list[Tensor] = []

        def forward(self, given: Tensor) -> Tensor:
            self.seen.append(self.dropout(torch.ones(64)))
            return self.out(given)

    def masks(text: str) -> list[Tensor]:
        from sheaf.parallel import build
        from sheaf.plans import Plan

        step = build(task, Plan.parse(text))
        step()
        return step.model.seen

    task = mlp_float64(model=Masks, batch=12, microbatch=3)
    alone = masks("serial")
    first, second = ranks(masks, 2, "dp=2")
    assert not torch.equal(first[0], second[0])
    assert len(alone) == 4
    assert all(torch.equal(one, other) for one, other in zip(alone, first + second, strict=True))


def test_under_zero_3_the_optimizer_steps_what_the_model_computes_with(ranks):
    """fully_shard after the optimizer was built trains nothing, without an error."""
    task = mlp_float64(batch=45, microbatch=15)
    losses = ranks(planned, 2, replace(task, shuffle=False), "dp=2,zero=3,bucket_bytes=1024", 4)[0].losses
    assert losses[3] < losses[2] < losses[1] < losses[0]


def test_a_time_out_names_who_waited_for_what_and_who_is_missing(ranks):
    """gloo's own message names no rank, no operation and no tensor."""

    def waiting() -> str:
        from datetime import timedelta

        import torch.distributed as dist

        from sheaf.errors import WorkerFailed
        from sheaf.parallel.world import World

        world, store = World(torch.device("cpu")), dist.distributed_c10d._get_default_store()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
        found = "nobody missing"
        if world.rank == 1:
            store.wait(["the other has given up"])
            found = "late"
        else:
            try:
                world.wait(world.all_reduce(torch.ones(3), "gradients of head.weight"))
            except WorkerFailed as error:
                found = str(error)
            store.set("the other has given up", "")
        dist.destroy_process_group()  # its connections are gone; the pool makes another for the next test
        return found

    message, other = ranks(waiting, 2)
    assert other == "late"
    assert "worker 0 of 2 lost the others in all_reduce of gradients of head.weight (3,)" in message
    assert "worker 1 has not answered: look at it first" in message
