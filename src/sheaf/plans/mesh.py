"""Where each worker stands among stages, replicas and the workers that split a layer, and who its neighbours are."""

from dataclasses import dataclass

from sheaf.plans.plan import Plan


@dataclass(frozen=True)
class Place:
    """A worker's coordinates: its pipeline rank, its replica, its part of each split layer."""

    pp: int
    dp: int
    tp: int


@dataclass(frozen=True)
class Mesh:
    """Ranks of ``pp`` x ``dp`` x ``tp`` workers; those that compute a microbatch together are next to each other.

    Workers that split sequences take the place of those that split layers; a plan has one or the other.

    >>> mesh = Mesh(pp=2, dp=2, tp=2)
    >>> mesh.place(5), mesh.rank(pp=1, dp=0, tp=1)
    (Place(pp=1, dp=0, tp=1), 5)
    >>> mesh.tp_groups[:2], mesh.dp_groups[:2], mesh.pp_groups[:2]
    (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 4), (1, 5)))
    """

    pp: int
    dp: int
    tp: int

    @classmethod
    def of(cls, plan: Plan) -> "Mesh":
        """The mesh of a plan."""
        return cls(plan.pp, plan.dp, plan.tp * plan.cp)

    @property
    def workers(self) -> int:
        """How many there are."""
        return self.pp * self.dp * self.tp

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        return Place(rank // (self.dp * self.tp), rank // self.tp % self.dp, rank % self.tp)

    def rank(self, *, pp: int, dp: int, tp: int) -> int:
        """Who stands there."""
        return (pp * self.dp + dp) * self.tp + tp

    def mates(self, rank: int) -> tuple[int, ...]:
        """The workers of a rank's replica, itself among them.

        >>> Mesh(pp=2, dp=2, tp=1).mates(2)
        (0, 2)
        """
        return self.replica_groups[self.place(rank).dp]

    @property
    def replica_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that compute a microbatch together."""
        return tuple(
            tuple(self.rank(pp=stage, dp=replica, tp=part) for stage in range(self.pp) for part in range(self.tp))
            for replica in range(self.dp)
        )

    @property
    def tp_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that split layers together."""
        return tuple(
            tuple(self.rank(pp=stage, dp=replica, tp=part) for part in range(self.tp))
            for stage in range(self.pp)
            for replica in range(self.dp)
        )

    @property
    def dp_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same part of the model."""
        return tuple(
            tuple(self.rank(pp=stage, dp=replica, tp=part) for replica in range(self.dp))
            for stage in range(self.pp)
            for part in range(self.tp)
        )

    @property
    def stage_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same blocks, or slices of them."""
        each = self.dp * self.tp
        return tuple(tuple(range(stage * each, (stage + 1) * each)) for stage in range(self.pp))

    @property
    def pp_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that pass a microbatch on from stage to stage."""
        return tuple(
            tuple(self.rank(pp=stage, dp=replica, tp=part) for stage in range(self.pp))
            for replica in range(self.dp)
            for part in range(self.tp)
        )
