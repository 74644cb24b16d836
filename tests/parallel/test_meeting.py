"""AdaSum against its formula written as a recursion, and means with neighbours against a matrix."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned
from test_local import Played, adam_mlp, run
from torch import nn

from sheaf.parallel.meeting import adasum, mixed, neighbours
from sheaf.parallel.world import World

SIZES = [7, 1, 12, 3]


def one_of(rank, dtype=torch.float64):
    return torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(rank), dtype=dtype)


def by_formula(vectors):
    """AdaSum of vectors of one layer: the first ones with those beyond a power of two, then halves of the list."""
    power = 2 ** int(np.log2(len(vectors)))
    firsts = [pair(a, b) for a, b in zip(vectors, vectors[power:], strict=False)]
    rest = firsts + vectors[len(firsts) : power]
    if len(rest) == 1:
        return rest[0]
    return pair(by_formula(rest[: power // 2]), by_formula(rest[power // 2 :]))


def pair(a, b):
    product = float(a @ b)
    one = 1 - product / (2 * float(a @ a)) if float(a @ a) else 1
    other = 1 - product / (2 * float(b @ b)) if float(b @ b) else 1
    return one * a + other * b


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_adasum_is_its_formula_layer_by_layer(ranks, world):
    def met():
        everyone = World(torch.device("cpu"))
        flat = one_of(everyone.rank)
        flat[7] = 0 if everyone.rank == 1 else 2.0  # a layer without a gradient, and layers that are the same
        adasum(everyone, flat, SIZES)
        everyone.close()
        return flat

    given = [one_of(rank) for rank in range(world)]
    for rank, vector in enumerate(given):
        vector[7] = 0 if rank == 1 else 2.0
    layers = [by_formula([vector.split(SIZES)[layer] for vector in given]) for layer in range(len(SIZES))]
    for found in ranks(met, world):
        torch.testing.assert_close(found, torch.cat(layers), rtol=1e-12, atol=1e-12)
    if world == 4:
        assert float(layers[1]) == pytest.approx(2.0), "the same from all who have one: their mean"


def test_adasum_of_orthogonal_ones_is_their_sum():
    assert torch.equal(pair(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(pair(torch.ones(3), torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("kind", ["ring", "exponential"])
def test_means_with_neighbours_are_a_matrix_whose_rows_and_columns_add_up_to_one(ranks, kind):
    def met(turn):
        everyone = World(torch.device("cpu"))
        found = mixed(everyone, one_of(everyone.rank), neighbours(kind, everyone.workers, turn))
        everyone.close()
        return found

    for world in (2, 3, 4):
        given = np.stack([one_of(rank).numpy() for rank in range(world)])
        for turn in range(2):
            away = (
                [1, -1]
                if kind == "ring" and world > 2
                else [1 if kind == "ring" else 2 ** (turn % (1, 2, 2)[world - 2])]
            )
            matrix = np.eye(world)
            for distance in away:
                matrix += np.roll(np.eye(world), -distance, axis=1)  # row i takes column i - distance
            matrix /= len(away) + 1
            np.testing.assert_allclose(matrix.sum(0), 1)
            found = np.stack([one.numpy() for one in ranks(met, world, turn)])
            np.testing.assert_allclose(found, matrix @ given, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", ["dp=2,shares=3:1,local=1:ring", "dp=3,local=1:ring", "dp=2,local=1:exponential"])
def test_where_every_worker_is_a_neighbour_sgd_is_the_serial_answer(ranks, plan):
    task = replace(mlp_float64(), optimizer=partial(torch.optim.SGD, lr=0.05))
    assert_same(ranks(planned, int(plan[3]), task, plan, 4)[0], plain(task, 4), 1e-11)


def test_training_with_neighbours_and_with_adasum(ranks):
    for kind in ("exponential", "adasum"):
        found = ranks(run, 4, adam_mlp(), f"dp=4,local=2:{kind}", steps=5)
        played = Played(adam_mlp(), (1, 1, 1, 1), total_weight=kind == "exponential")
        anchor = played.weights(0)
        for step in range(5):
            loss = played.step(step)
            mine = [played.weights(worker) for worker in range(4)]
            if step % 2:
                if kind == "adasum":
                    sizes = [value.numel() for value in played.models[0].parameters()]
                    away = [(anchor - weights).split(sizes) for weights in mine]
                    met = [by_formula([one[layer] for one in away]) for layer in range(len(sizes))]
                    anchor = anchor - torch.cat(met)
                for worker in range(4):
                    other = mine[worker - 2 ** (step // 2)]
                    played.put(worker, anchor if kind == "adasum" else (mine[worker] + other) / 2)
            for worker in range(4):
                assert found[worker][0][step] == pytest.approx(loss, rel=1e-11)
                torch.testing.assert_close(found[worker][1][step], played.weights(worker), rtol=1e-9, atol=1e-11)
        whole = nn.utils.parameters_to_vector(found[0][2][name] for name, _ in played.models[0].named_parameters())
        if kind == "exponential":  # the mean of all counts; with AdaSum that by what each has seen since
            mean = sum(played.weights(worker) for worker in range(4)) / 4
            torch.testing.assert_close(whole, mean, rtol=1e-9, atol=1e-11)


def test_gossip_goes_on_from_a_checkpoint_to_the_bit(ranks):
    for settings in ("local=1:exponential", "local=2:adasum"):
        whole = ranks(run, 4, adam_mlp(), "dp=4," + settings, steps=5)
        resumed = ranks(run, 4, adam_mlp(), "dp=4," + settings, steps=5, resume_after=3)
        for one, other in zip(whole, resumed, strict=True):
            assert one[0] == other[0]
            assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
