"""The plan: one frozen, readable value that says who computes what, and how gradients meet."""

import tomllib
from dataclasses import dataclass, fields, replace
from functools import cached_property

import tomli_w

from sheaf.errors import PlanError, nearest
from sheaf.plans import text
from sheaf.plans.again import AGAIN, as_text, from_text, matches, unrepeatable
from sheaf.plans.begins import begins_of, counts_of, uncuttable
from sheaf.plans.compression import Compression, uncodable
from sheaf.plans.local import Local, unmeetable
from sheaf.plans.offload import ON_DEVICE, unoffloadable
from sheaf.plans.rows import ROWS, named, unmixable
from sheaf.plans.server import Server, unservable
from sheaf.plans.shares import BALANCED, EQUAL, STOLEN, undealable, weights_of
from sheaf.plans.text import DEFAULT_SCHEDULE

RECOMPUTE = ("none", "full")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
DEFAULT_BUCKET_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who computes which part of a step, when, and how the gradients meet. It never changes what is computed.

    ``dp``          replicas among which the batch is split (data parallel)
    ``tp``          workers that split each layer of a replica (tensor parallel)
    ``cp``          workers among which each sequence is split (context parallel)
    ``pp``          stages into which the layers of a replica are cut (pipeline); ``pp=4:gpipe`` names the schedule
    ``schedule``    ``gpipe``, ``1f1b``, ``interleaved`` or ``zero-bubble``: the order of a stage's work
    ``virtual``     stages per worker of an interleaved pipeline
    ``stages``      blocks per stage, such as ``3:4:5``, or the module with which each later stage begins, which may be
                    inside of a block: ``layers.4.norm``; open: balanced by what blocks cost
    ``sequence``    1: between split layers, norms and what adds up are split along the sequence
    ``shares``      how the batch is split: ``equal``, weights such as ``11:5`` (one per replica), ``stolen`` from a
                    common queue, or ``balanced``: dealt by how fast each replica was in the last steps
    ``zero``        0: all state on every worker; 1: optimizer state sharded; 2: gradients too; 3: parameters too.
    ``shards``      how large they are: weights such as ``2:1``; open: those of weighted shares, equal under all others
    ``recompute``   ``none``, or ``full``: each block keeps only its input and runs forward again in backward
    ``offload``     ``none``, or ``optimizer``: its state is in the host's memory, and it steps there
    ``local``       steps between meetings of weights, and how they meet: ``16``, ``16:diloco``, ``1:adasum``,
                    ``1:ring``, ``1:backup:quorum=3``; settings of ``plans.local.Local`` follow. Relaxed, not serial
    ``compress``    gradients travel as ``bf16``, ``fp16``, ``int8``, ``topk:0.01`` or ``powersgd:4``. Relaxed too
    ``server``      parameters lie on shards beside the first of the ``dp`` workers, who push gradients and pull values:
                    ``2`` in lock-step, ``2:staleness=4`` at most four clocks behind, ``2:async`` (the last two:
                    relaxed). With ``2:apart`` for ``2`` they lie on two more workers, which only serve
    ``late``        gradients on old values are taken ``plain``, ``scaled``, ``compensated`` or ``buffered``;
                    ``scaled:20`` drops those more than 20 updates late
    ``microbatch``  samples per microbatch where the task leaves it open
    ``bucket_bytes``  gradients travel in buckets of about this size
    ``parts``       other answers for modules named by globs: ``classifier.*=tp`` splits them inside the layer over the
                    ``dp`` workers that else hold replicas, ``head=whole`` keeps them whole under ``tp``,
                    ``*.experts=ep`` deals their stacked experts out over the replicas, who send each other tokens;
                    ``words=sparse``: the gradient of a table travels as its touched rows, ``words=rows``: so do its
                    values, from the replicas among whom its rows are dealt out. ``h.{0-3}=recompute``: of all blocks
                    these alone run forward again in backward

    >>> Plan.parse("dp=4,zero=3")
    Plan(dp=4,zero=3)
    >>> Plan.parse("dp=2,shares=11:5").weights
    (11, 5)
    >>> Plan.parse("dp=2,tp=2,pp=2:gpipe").workers
    8
    >>> Plan.parse("dp=4,classifier.*=tp").parts
    (('classifier.*', 'tp'),)
    >>> Plan.parse("serial") == Plan()
    True
    """

    dp: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    schedule: str = DEFAULT_SCHEDULE
    virtual: int = 1
    stages: str = ""
    sequence: int = 0
    shares: str = EQUAL
    zero: int = 0
    shards: str = ""
    recompute: str = "none"
    offload: str = ON_DEVICE
    local: str = ""
    compress: str = "none"
    server: str = ""
    late: str = "plain"
    microbatch: int | None = None
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    parts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        broken = self._broken()
        if broken:
            raise PlanError(broken)

    @property
    def workers(self) -> int:
        """How many workers the plan runs on, those that only serve included."""
        return self.computing + (self.serves.serving if self.server else 0)

    @property
    def computing(self) -> int:
        """How many workers compute: they come first."""
        return self.dp * self.tp * self.cp * self.pp

    @property
    def num_stages(self) -> int:
        """Into how many stages the layers are cut, all of a worker's counted."""
        return self.pp * self.virtual

    @cached_property
    def stage_blocks(self) -> tuple[int, ...]:
        """Blocks per stage where the plan says so; empty where they are balanced when the plan is built."""
        return counts_of(self.stages)

    @cached_property
    def begins(self) -> tuple[str, ...]:
        """The modules with which the second stage and each later one begin, where the plan names them."""
        return begins_of(self.stages)

    @property
    def split_parts(self) -> bool:
        """Whether parts of the model are split over workers that hold replicas of the rest."""
        return bool(self.parts) and any(answer == "tp" for _, answer in self.parts)

    @property
    def expert_parts(self) -> bool:
        """Whether replicas hold experts for each other, and send each other tokens."""
        return bool(self.parts) and any(answer == "ep" for _, answer in self.parts)

    @property
    def again(self) -> bool:
        """Whether any block runs forward again in backward."""
        return self.recompute == "full" or (bool(self.parts) and bool(named(self.parts, AGAIN)))

    @property
    def by_parts(self) -> bool:
        """Whether replicas hold different slices of some parts."""
        return bool(self.parts) and (self.split_parts or self.expert_parts or bool(named(self.parts, ROWS)))

    @property
    def split_degree(self) -> int:
        """Over how many workers layers are split, all of them (``tp``) or those of parts (``dp``); 1 where none is."""
        return self.dp if self.split_parts or self.expert_parts else self.tp

    @property
    def alike(self) -> int:
        """How many workers hold the same parameters, or shards of them: replicas, and those that split a sequence."""
        return self.dp * self.cp

    @property
    def split_kind(self) -> tuple[int, int]:
        """What decides how layers are split: over how many workers, and 0, 1 (along the sequence too), 2 (experts) or 3
        (sequences alone, with ``cp``).

        >>> Plan.parse("dp=4,*.experts=ep").split_kind, Plan.parse("tp=2,sequence=1").split_kind
        ((4, 2), (2, 1))
        >>> Plan.parse("cp=2").split_kind
        (2, 3)
        """
        if self.cp > 1:
            return self.cp, 3
        return self.split_degree, 2 if self.expert_parts else self.sequence

    def part(self, module: str) -> str | None:
        """What the plan says of a module by name: an answer such as ``tp``, or nothing. The first that matches counts.

        >>> Plan.parse("dp=4,classifier=tp").part("classifier.0")
        'tp'
        """
        for glob, answer in self.parts:
            if answer != AGAIN and matches(glob, module):
                return answer
        return None

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """The share of each replica, for equal and weighted shares."""
        return weights_of(self.shares, self.dp)

    @cached_property
    def shard_weights(self) -> tuple[int, ...]:
        """How large the shards of each replica are beside those of others.

        >>> Plan.parse("dp=2,zero=1,shares=2:1").shard_weights
        (2, 1)
        >>> Plan.parse("dp=2,shares=stolen,zero=1,shards=3:1").shard_weights
        (3, 1)
        """
        return weights_of(self.shards or self.shares, self.dp)

    @property
    def even_shards(self) -> bool:
        """Whether nothing is said of how large shards are."""
        return ":" not in (self.shards or self.shares)

    @property
    def stolen(self) -> bool:
        """Whether workers take microbatches from a common queue."""
        return self.shares == STOLEN

    @property
    def balanced(self) -> bool:
        """Whether replicas are dealt microbatches by how fast they were in the last steps."""
        return self.shares == BALANCED

    @cached_property
    def meets_locally(self) -> Local:
        """Whether and how workers step alone between meetings."""
        return Local.parse(self.local) if self.local else Local()

    @cached_property
    def compression(self) -> Compression:
        """How gradients, or what weights departed by, are made smaller on their way."""
        return Compression.parse(self.compress)

    @cached_property
    def serves(self) -> Server:
        """Whether and how a parameter server holds the parameters."""
        return Server.parse(self.server, self.late) if self.server else Server()

    @property
    def exact(self) -> bool:
        """Whether the plan computes the serial answer, up to rounding; every other is relaxed."""
        return not self.local and self.compress == "none" and (not self.server or self.serves.exact)

    @property
    def serial(self) -> bool:
        """Whether one worker does everything."""
        return self.workers == 1

    def __str__(self) -> str:
        """The plan as text: only what departs from the default; ``serial`` when nothing does."""
        written = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != field.default and field.name not in ("pp", "schedule", "parts")
        ]
        if self.pp > 1:
            named = f":{self.schedule}" if self.schedule != DEFAULT_SCHEDULE else ""
            written.insert(sum(key > 1 for key in (self.dp, self.tp, self.cp)), f"pp={self.pp}{named}")
        written += [f"{glob}={answer}" for glob, answer in self.parts]
        return ",".join(written) or "serial"

    def __repr__(self) -> str:
        return f"Plan({self})"

    @classmethod
    def parse(cls, written: str) -> "Plan":
        """Read a plan from text such as ``dp=4,zero=3`` or ``serial``.

        Raises PlanError listing every unknown key (with the nearest known one) and every bad value.
        """
        return cls.from_pairs(text.pairs(written))

    @classmethod
    def from_toml(cls, written: str) -> "Plan":
        """Read a plan from TOML (``dp = 4``), as ``to_toml`` writes it."""
        try:
            table = tomllib.loads(written)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"the plan is not TOML: {error}") from None
        parts: dict[str, object] = table.pop("parts", {})
        return cls.from_pairs([*((key, str(value)) for key, value in table.items()), *from_text(parts)])

    @classmethod
    def from_pairs(cls, pairs: list[tuple[str, str]]) -> "Plan":
        """Read a plan from (key, text) pairs; raises PlanError listing everything wrong with them."""
        values, broken = text.values(pairs, [field.name for field in fields(cls)])
        try:
            plan = cls(**values)  # pyright: ignore[reportArgumentType]
        except PlanError as error:
            raise PlanError((*broken, *error.broken)) from None
        if broken:
            raise PlanError(broken)
        return plan

    def to_toml(self) -> str:
        """Every key of the plan as TOML, defaults included (an open microbatch is left out)."""
        table = {field.name: getattr(self, field.name) for field in fields(self)}
        table["parts"] = as_text(self.parts) or None
        return tomli_w.dumps({key: value for key, value in table.items() if value is not None})

    def with_text(self, written: str) -> "Plan":
        """The same plan but for what is written; raises PlanError as ``parse``.

        >>> Plan.parse("dp=4,zero=1").with_text("zero=0,local=16:diloco")
        Plan(dp=4,local=16:diloco)
        >>> Plan.parse("dp=2,h.*=tp").with_text("h.*=recompute")
        Plan(dp=2,h.*=tp,h.*=recompute)
        >>> Plan.parse("dp=2,zero=1,shards=2:1").with_text("zero=0,server=2")
        Plan(dp=2,server=2)
        """
        said = text.pairs(written)
        anew = {text.said_of(pair) for pair in said}
        if ("zero", "0") in said:
            anew.add(("shards", False))  # there are none any more
        return self.from_pairs([pair for pair in text.pairs(str(self)) if text.said_of(pair) not in anew] + said)

    def with_microbatch(self, microbatch: int) -> "Plan":
        """The same plan with the microbatch written in."""
        return replace(self, microbatch=microbatch)

    def _broken(self) -> list[str]:
        broken: list[str] = []
        for key, workers in (("dp", self.dp), ("tp", self.tp), ("cp", self.cp)):
            if workers < 1:
                broken.append(f"{key}={workers}: at least one worker is needed")
        if self.zero not in (0, 1, 2, 3):
            broken.append(f"zero={self.zero}: ZeRO has stages 0, 1, 2 and 3")
        if self.recompute not in RECOMPUTE:
            broken.append(f"recompute={self.recompute}: {nearest(self.recompute, RECOMPUTE)}")
        if self.microbatch is not None and self.microbatch < 1:
            broken.append(f"microbatch={self.microbatch}: at least one sample is needed")
        if self.bucket_bytes < 1024:
            broken.append(f"bucket_bytes={self.bucket_bytes}: use at least 1024")
        broken += (unmixable(self) + unrepeatable(self) if self.parts else []) + unoffloadable(self)
        return broken + undealable(self) + _broken_pipeline(self) + _broken_relaxed(self) + _illegal_mixes(self)


def _broken_pipeline(plan: Plan) -> list[str]:
    broken: list[str] = []
    if plan.pp < 1:
        broken.append(f"pp={plan.pp}: at least one stage is needed")
    if plan.schedule not in SCHEDULES:
        broken.append(f"schedule={plan.schedule}: {nearest(plan.schedule, SCHEDULES)}")
    if plan.virtual < 1 or (plan.virtual > 1) != (plan.schedule == "interleaved"):
        broken.append(
            f"virtual={plan.virtual} with schedule={plan.schedule}: an interleaved pipeline has 2 or more stages per "
            "worker, every other has 1: write pp=2:interleaved,virtual=2"
        )
    if plan.pp == 1 and (plan.schedule != DEFAULT_SCHEDULE or plan.stages):
        broken.append("schedule and stages are of a pipeline, and pp=1: raise pp or drop them")
    broken += uncuttable(plan.stages, pp=plan.pp, virtual=plan.virtual)
    return broken


def _broken_relaxed(plan: Plan) -> list[str]:
    if (plan.local, plan.server, plan.compress, plan.late) == ("", "", "none", "plain"):
        return []
    broken = unmeetable(
        plan.local, dp=plan.dp, tp=plan.tp, pp=plan.pp, cp=plan.cp, zero=plan.zero, parts=plan.split_parts,
        shares=plan.shares, compress=plan.compress,
    )  # fmt: skip
    return broken + uncodable(plan.compress, alike=plan.alike, zero=plan.zero) + _broken_server(plan)


def _broken_server(plan: Plan) -> list[str]:
    cuts = {"tp": plan.tp, "cp": plan.cp, "pp": plan.pp, "zero": plan.zero}
    meets = plan.local, plan.compress
    return unservable(plan.server, plan.late, dp=plan.dp, cuts=cuts, parts=plan.parts, stolen=plan.stolen, meets=meets)


def _illegal_mixes(plan: Plan) -> list[str]:
    """Combinations that cannot work, each with the reason and the nearest one that does."""
    broken: list[str] = []
    if plan.sequence not in (0, 1) or (plan.sequence and plan.tp == 1):
        broken.append(f"sequence={plan.sequence} splits along the sequence between split layers: use 0, or 1 with tp")
    split = next((glob for glob, answer in plan.parts if answer == "tp"), None) if plan.parts else None
    if split and (plan.tp > 1 or plan.pp > 1 or plan.dp == 1 or plan.zero or plan.stolen):
        broken.append(
            f"{split}=tp splits a part over the workers that are replicas elsewhere: use it with dp alone (its "
            "parameters are held once already), zero=0 and dealt shares"
        )
    dealt = next((glob for glob, answer in plan.parts if answer == "ep"), None) if plan.parts else None
    alone = plan.tp == plan.cp == plan.pp == 1 and not (plan.zero or plan.stolen or plan.local or split)
    if dealt and (plan.dp == 1 or not alone):
        broken.append(
            f"{dealt}=ep deals experts out over dp workers that send each other tokens round by round: use "
            f"dp={max(2, plan.computing)},{dealt}=ep with zero=0, dealt shares and no other split (an expert is held "
            "once already)"
        )
    kept = [glob for glob, answer in plan.parts if answer == "whole"]
    if kept and plan.tp == 1:
        broken.append(f"{kept[0]}=whole keeps a part whole under tp, and tp=1: raise tp or drop it")
    if plan.cp > 1 and (plan.tp > 1 or split):
        broken.append(
            f"cp={plan.cp} splits sequences among workers that hold whole layers: use it with dp, pp and zero, or use "
            f"tp={plan.tp * plan.cp},sequence=1 in its place"
        )
    if plan.dp * plan.cp == 1 and plan.zero:
        broken.append(f"zero={plan.zero} shards state among dp workers, and dp=1: raise dp or drop zero")
    return broken
