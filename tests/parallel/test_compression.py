"""What compressors lose comes back: over many steps, all that was given has been received or is still kept."""

import pytest
import torch

from sheaf.parallel.compression import compressor
from sheaf.parallel.world import World
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
