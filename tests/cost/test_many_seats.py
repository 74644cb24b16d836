"""What is worked out by kinds and runs, for a hundred thousand workers, is what each worker looked at finds."""

from collections import Counter
from dataclasses import replace

import made
import numpy as np
import pytest

from sheaf.cluster.cluster import Tier
from sheaf.cost.deals import dealt
from sheaf.cost.placement import seats
from sheaf.cost.seating import Seating
from sheaf.cost.sizes import Sizes, microbatch_sizes
from sheaf.plans import Plan
from sheaf.plans.layout import apportion
from sheaf.plans.mesh import Mesh

MESHES = [Mesh(pp, dp, tp) for pp in (1, 2, 3) for dp in (1, 2, 3, 5) for tp in (1, 2, 4) if pp * dp * tp <= 24]


def tiered():
    """Six hosts of four, sockets of two and racks of eight."""
    tiers = (
        Tier(name="socket", workers=2, latency_seconds=0.0, bytes_per_second=4e9),
        Tier(name="rack", workers=8, latency_seconds=0.0, bytes_per_second=5e8),
    )
    return replace(made.cluster(4, hosts=6), tiers=tiers)


def test_the_links_of_a_mesh_are_those_of_each_of_its_groups():
    seating = Seating(tiered())
    for mesh in MESHES:
        kinds = {"tp": mesh.tp_groups, "dp": mesh.dp_groups, "pp": mesh.pp_groups, "stage": mesh.stage_groups}
        for kind, groups in kinds.items():
            wanted = {link.name for group in groups for link in seating.between(group).links}
            assert {link.name for link in seating.fabric(mesh, kind).links} == wanted, (mesh, kind)
        passing = seating.passing(mesh)
        for replica in range(mesh.dp):
            stages = [mesh.rank(pp=stage, dp=replica, tp=0) for stage in range(mesh.pp)]
            pairs = zip(stages, [*stages[1:], stages[0]], strict=True)
            wanted = [seating.between(pair) if mesh.pp > 1 else passing[replica][0] for pair in pairs]
            assert list(passing[replica]) == wanted, mesh
        firsts = [passing[replica] for replica in passing.unlike(range(mesh.dp))]
        assert Counter(map(id, firsts)) == Counter({id(passing[replica]) for replica in range(mesh.dp)})


@pytest.mark.parametrize("text", ["dp=1", "dp=3", "dp=7", "dp=12", "dp=3,shares=2:1:1"])
def test_replicas_are_dealt_runs_of_the_batch(text):
    plan = Plan.parse(text)
    for sizes in (microbatch_sizes(23, 3), microbatch_sizes(24, 3), microbatch_sizes(6, 6), Sizes((1, 3, 2, 2))):
        shares = dealt(plan, sizes)
        assert [one for share in shares for one in share] == list(sizes)
        assert tuple(map(len, shares)) == apportion(len(sizes), plan.weights)


def test_seats_are_told_by_rank():
    cluster = made.cluster(2, speeds=(1.0, 0.5, 1.0))
    placed = seats(cluster, 5)
    assert [placed[rank].host_name for rank in range(5)] == ["host0", "host0", "host1", "host1", "host2"]
    assert list(placed) == [placed[rank] for rank in range(5)] == [placed.kinds[one] for one in placed.numbers]
    assert placed.machines.tolist() == [0, 0, 1, 1, 2]
    assert np.unique(placed.numbers).size == len(placed.kinds)
    with pytest.raises(IndexError):
        placed[5]
