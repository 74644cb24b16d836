"""What compressors lose comes back: over many steps, all that was given has been received or is still kept."""

import pytest
import torch
from torch import nn

import sheaf
from sheaf.parallel.compression import compressor
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.compression import Compression

SHAPES = [torch.Size(shape) for shape in ([17, 9], [5], [6, 4, 3, 3], [1], [300])]


def summed(text, steps, dtype):
    world = World(torch.device("cpu"))
    example = torch.zeros(sum(shape.numel() for shape in SHAPES), dtype=dtype)
    found = compressor(Compression.parse(text), world, example, SHAPES)
    given, received = torch.zeros_like(example), torch.zeros_like(example)
    out = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + world.rank)
        mine = torch.randn(example.shape, generator=generator, dtype=dtype)
        given += mine
        flat = mine.clone()
        world.wait(found.start(flat))
        received += flat
        out.append(flat)
    lost = [value.reshape(-1) for name, value in found.kept().items() if name.startswith("lost")]
    world.close()
    return given, received, lost, out


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("text", ["bf16", "fp16", "int8", "topk:0.05", "powersgd:2"])
def test_nothing_is_lost_for_good(ranks, text, world):
    rows = ranks(lambda: summed(text, 6, torch.float64), world)
    for other in rows[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rows[0][3], other[3], strict=True)), "workers got different sums"
    given = sum(row[0] for row in rows)
    count = given.numel()
    kept = sum(row[2][0][:count] for row in rows)
    if len(rows[0][2]) > 1:  # each worker keeps what coding its part of the sum lost
        kept = kept + torch.cat([row[2][1] for row in rows])[:count]
    torch.testing.assert_close(rows[0][1] + kept, given, rtol=1e-9, atol=1e-9)
    assert float(kept.norm()) > 0


@pytest.mark.parametrize(("text", "tolerance"), [("bf16", 0.02), ("fp16", 0.002), ("int8", 0.03)])
def test_one_sum_is_near(ranks, text, tolerance):
    rows = ranks(lambda: summed(text, 1, torch.float32), 2)
    given = rows[0][0] + rows[1][0]
    assert 0 < float((rows[0][3][0] - given).norm() / given.norm()) < tolerance


def test_factors_of_a_matrix_of_their_rank_are_the_matrix(ranks):
    def low_rank():
        world = World(torch.device("cpu"))
        matrix = torch.arange(12.0, dtype=torch.float64)[:, None] @ torch.ones(1, 15, dtype=torch.float64)
        found = compressor(Compression.parse("powersgd:1"), world, matrix.view(-1), [torch.Size([12, 15])])
        flat = matrix.view(-1) * (world.rank + 1)
        world.wait(found.start(flat))
        world.close()
        return flat, matrix.view(-1) * 3

    for got, wanted in ranks(low_rank, 2):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


class InTurn(nn.Module):
    """Two parameters, of which a batch uses one, and whose gradients are its numbers, whatever their values."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd = nn.Parameter(torch.zeros(24, 20)), nn.Parameter(torch.zeros(24, 20))

    def forward(self, numbers, turn):
        return ((self.odd if turn[0] else self.even) * numbers).sum((1, 2))


def in_turn(text, steps):
    """What this worker's coding still keeps of each parameter, the parameter, and all that it was given."""
    numbers = torch.randn(4 * steps, 24, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    task = sheaf.Task(
        model=InTurn,
        loss=lambda output, batch: sheaf.Loss(output.sum(), len(output)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        data=[(each, index // 4 % 2) for index, each in enumerate(numbers)],
        inputs=lambda batch: (batch[0], batch[1]),
        batch=4,
        microbatch=2,
        precision="fp64",
        shuffle=False,
    )
    step = sheaf.build(task, Plan.parse(f"dp=2,compress={text}"))
    for _ in range(steps):
        step()
    kept = {name: value.reshape(-1).clone() for name, value in step._holding.extra().items()}
    found = {name: value.detach().clone() for name, value in step.model.named_parameters()}
    (names,) = step._holding._buckets
    step.close()
    given = numbers.unflatten(0, (-1, 4)).mean(1)
    return kept, names, found, {"even": given[::2].sum(0), "odd": given[1::2].sum(0)}


@pytest.mark.parametrize("text", ["int8", "topk:0.05", "powersgd:2"])
def test_what_is_owed_to_a_parameter_waits_while_nobody_uses_it(ranks, text):
    rows = ranks(lambda: in_turn(text, 6), 2)
    _, names, found, given = rows[0]
    kept = sum(row[0]["bucket0/lost"] for row in rows)[: 2 * 480]
    if "bucket0/lost_sum" in rows[0][0]:
        kept = kept + torch.cat([row[0]["bucket0/lost_sum"] for row in rows])[: 2 * 480]
    for name, left in zip(names, kept.split(480), strict=True):
        assert float(left.norm()) > 0
        torch.testing.assert_close(left.view(24, 20) - found[name], given[name], rtol=1e-9, atol=1e-9)
