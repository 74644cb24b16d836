"""Published runs: rows of JSON to workloads, or the reasons why not; nothing in a row can crash it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sheaf.cost.analytic.networks import network_named
from sheaf.cost.analytic.workload import Shape, Split, Workload
from sheaf.errors import SheafError

MOST = 10**7  # of any size in a row: above it nothing was ever trained
MOST_DEGREE = 2**16  # of a parallel degree, and of layers
_TRANSFORMERS = ("gpt", "llama", "bert", "moe")
_UNPRICED = {
    "hybrid-mamba": "state-space layers",
    "hybrid-mamba-moe": "state-space layers",
    "transgan": "layers of unknown width",
    "enc-dec transformer": "an encoder and a decoder",
}
_SCHEDULES = ("gpipe", "1f1b")
_PARALLEL = frozenset(
    {
        "dp",
        "tp",
        "pp",
        "cp",
        "ep",
        "vpp",
        "zero_stage",
        "fsdp_shard",
        "hsdp_replicas",
        "seq_parallel",
        "schedule",
        "recompute",
        "offload",
        "overlap",
        "layer_partition",
    }
)
# What the sources call it: operations every second of which is kept; all but matrix products run again; and so on.
_RECOMPUTED = {
    "per-op": "alternate",
    "selective": "selective",
    "save dots": "elementwise",
    "minimal": "elementwise",
    "offloaded": "full",
    "full": "full",
}


class Refused(SheafError):
    """A row that cannot be priced; ``reasons`` lists all of them."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(dict.fromkeys(reasons))
        super().__init__("; ".join(self.reasons))


@dataclass
class _Reader:
    """Reads a row field by field, and keeps what is wrong with it."""

    row: Mapping[str, Any]
    reasons: list[str] = field(default_factory=list[str])
    assumed: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.sections: dict[str, Mapping[str, Any]] = {}
        for name in ("model", "batch", "parallel", "hardware"):
            found = self.row.get(name)
            if found is not None and not isinstance(found, Mapping):
                self.reasons.append(f"{name}: found {_shown(found)}, wanted an object")
            self.sections[name] = found if isinstance(found, Mapping) else {}

    def get(self, place: str) -> Any:
        section, _, name = place.partition(".")
        return self.sections[section].get(name) if name else self.row.get(section)

    def whole(self, place: str, default: int | None = None, *, least: int = 1, most: int = MOST, why: str = "") -> int:
        """A whole number; absent: the default, which is noted where ``why`` says it was assumed."""
        value = self.number(place, default, least=least, most=most, why=why)
        if value != int(value):
            self.reasons.append(f"{place}: found {value}, wanted a whole number")
            return least
        return int(value)

    def degree(self, place: str, default: int | None = 1, *, why: str = "") -> int:
        """A number of layers, stages or workers."""
        return self.whole(place, default, most=MOST_DEGREE, why=why)

    def number(
        self, place: str, default: float | None = None, *, least: float = 0, most: float = MOST, why: str = ""
    ) -> float:
        """A number; a row without it is refused where there is no default."""
        value = self.get(place)
        if value is None:
            if default is None:
                self.reasons.append(f"{place} is absent: it was not published")
                return max(least, 1)
            if why:
                self.assumed.append(f"{place} {default:g}: {why}")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # noqa: PLR0124 - NaN
            self.reasons.append(f"{place}: found {_shown(value)}, wanted a number")
            return max(least, 1)
        if not least <= value <= most:
            self.reasons.append(f"{place}: found {_shown(value)}, wanted {least:g} to {most:g}")
            return max(least, 1)
        return value

    def text(self, place: str, default: str = "") -> str:
        value = self.get(place)
        if value is None:
            return default
        if not isinstance(value, str):
            self.reasons.append(f"{place}: found {_shown(value)}, wanted text")
            return default
        return value

    def yes(self, place: str, default: bool = False) -> bool:
        value = self.get(place)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.reasons.append(f"{place}: found {_shown(value)}, wanted true or false")
        return bool(value)


def workload(row: Any) -> Workload:
    """The workload of one row. Raises Refused with every reason why it cannot be priced."""
    if not isinstance(row, Mapping):
        raise Refused([f"found {_shown(row)}, wanted an object"])
    read = _Reader(row)
    shape = _shape(read)
    split = _split(read, shape)
    micro, accumulated = _batch(read, split)
    precision, mixed = _precision(read)
    devices = _devices(read)
    workers = read.whole("hardware.num_gpus", split.workers)
    made = Workload(
        id=str(read.get("id")),
        shape=shape,
        split=split,
        micro=micro,
        accumulated=accumulated,
        precision=precision,
        mixed=mixed,
        devices=devices,
        workers=workers,
        workers_per_host=read.whole("hardware.gpus_per_node", 8, why="not published"),
        intra_bytes_per_second=1e9 * read.number("hardware.intra_node_bw_gbps_per_gpu", 0),
        inter_bytes_per_second=1e9 * read.number("hardware.inter_node_bw_gbps_per_node", 0),
        model=read.text("model.name"),
        software=_software(read, split),
        adapters="lora" in read.text("task") or "peft" in read.text("task"),
        notes=tuple(note for note in _list(read.get("notes")) if isinstance(note, str)),
        assumed=tuple(read.assumed),
    )
    if read.reasons:
        raise Refused(read.reasons)
    return made


def _shape(read: _Reader) -> Shape:
    family = read.text("model.family").lower()
    name = read.text("model.name")
    if family == "cnn":
        found = network_named(name)
        if found is None:
            read.reasons.append(f"model.name: {name!r} is no network whose sizes are known")
        return Shape(family=family, network=found or "", causal=False)
    if family not in _TRANSFORMERS:
        what = _UNPRICED.get(family, f"family {family!r}")
        read.reasons.append(f"model.family: {what} cannot be priced from what is published")
        return Shape(family=family)
    hidden, heads = read.whole("model.hidden"), read.whole("model.heads")
    attention = read.text("model.attention")
    gated = read.yes("model.glu", family == "llama")
    experts = read.whole("model.experts", 0, least=0)
    chosen = read.whole("model.experts_topk", 2 if experts else 0, least=0)
    spread = read.degree("parallel.ep")
    if experts and max(chosen, spread) > experts:
        read.reasons.append(f"model.experts: {experts}; experts_topk {chosen} and parallel.ep {spread} cannot be more")
    ffn = read.whole("model.ffn", 4 * hidden)
    vocabulary = read.whole("model.vocab", _vocabulary(family), why="that of models of this family")
    layers = read.degree(
        "model.layers", _layers_of(name, hidden, ffn, vocabulary), why="from the size in the model's name"
    )
    sequence = read.whole("model.seq", 512 if family == "bert" else None)
    width = read.number("model.head_dim", hidden / heads, least=1)
    if 8 * width * heads < hidden:
        read.reasons.append(f"model.heads: {heads} of {width:g} for {hidden} hidden do not fit together")
    window = re.search(r"(\d+)-token sliding window", attention)
    return Shape(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=min(heads, read.whole("model.kv_heads", heads)),
        head_width=max(1, round(width)),
        ffn=ffn,
        vocabulary=vocabulary,
        sequence=sequence,
        gated=gated,
        causal="bidirectional" not in attention and family != "bert",
        latent="MLA" in attention,
        window=int(window[1]) if window else 0,
        biased=bool(re.search(r"gpt[-_ ]?oss", name, re.IGNORECASE)),
        ahead=int(bool(re.search(r"deep-?seek[-_ ]?v3(?!.*w/o mtp)", name, re.IGNORECASE))),
        tied=read.yes("model.tied_embeddings", family in ("gpt", "bert")),
        experts=experts,
        experts_per_token=chosen,
        expert_ffn=read.whole("model.moe_ffn", ffn if experts else 0, least=0),
        expert_layers=min(layers, read.whole("model.moe_layers", layers if experts else 0, least=0)),
    )


def _layers_of(name: str, hidden: int, ffn: int, vocabulary: int) -> int | None:
    """How many layers a dense model has whose name tells its parameters, as BS-194B does; None where it does not."""
    found = re.search(r"(\d+(?:\.\d+)?)B\b", name)
    if not found or hidden < 64:
        return None
    return max(1, round((float(found[1]) * 1e9 - vocabulary * hidden) / (4 * hidden**2 + 2 * hidden * ffn)))


def _software(read: _Reader, split: Split) -> str:
    """Everything by which a stack may be known: where it was published, what ran, and how state was spread."""
    words = [read.text(place) for place in ("source", "software", "parallel.overlap")]
    if "section title" in words[1]:  # of the page that the run stands on
        words.insert(2, read.text("location").rpartition(">")[2].strip(" ]"))
    return " ".join([*words, f"zero={split.zero}", f"family={read.text('model.family')}"]).strip()


def _vocabulary(family: str) -> int:
    return {"bert": 30522, "llama": 32000, "moe": 131072}.get(family, 50257)


def _split(read: _Reader, shape: Shape) -> Split:
    tp, pp = read.degree("parallel.tp"), read.degree("parallel.pp")
    cp = read.degree("parallel.cp")
    workers = read.whole("hardware.num_gpus", tp * pp * cp * read.degree("parallel.dp"))
    if read.get("parallel.dp") is None and read.get("parallel.tp") is None and workers > 1:
        read.reasons.append("parallel: how the run was split was not published")
    dp = read.whole("parallel.dp", max(1, workers // (tp * pp * cp)))
    if dp * tp * pp * cp != workers:  # the count of workers is what a job gets; the factors are easily misquoted
        read.assumed.append(f"{workers} workers where tp {tp}, pp {pp}, cp {cp}, dp {dp} make {dp * tp * pp * cp}")
        pp = max(1, min(pp, workers // (tp * cp)))
        dp = max(1, workers // (tp * pp * cp))
    schedule = read.text("parallel.schedule").lower()
    if pp > 1 and schedule and not any(name in schedule for name in _SCHEDULES):
        read.assumed.append(f"parallel.schedule 1f1b: {schedule!r} is not known")
    unknown = [name for name in read.sections["parallel"] if name not in _PARALLEL]
    if unknown:
        read.assumed.append(f"parallel.{', parallel.'.join(name[:40] for name in unknown)} left out: not known")
    zero = read.whole("parallel.zero_stage", 0, least=0)
    if zero > 3:
        read.reasons.append(f"parallel.zero_stage: found {zero}, wanted 0 to 3")
    virtual = read.degree("parallel.vpp")
    stages = _stages(read, pp, shape.layers)
    if shape.layers and pp > shape.layers and read.get("model.hidden") is not None:
        read.reasons.append(f"parallel.pp: {pp} stages for {shape.layers} layers")
    return Split(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=read.degree("parallel.ep"),
        virtual=virtual,
        zero=zero,
        shards=min(dp * cp, read.whole("parallel.fsdp_shard", dp * cp)) if zero else 1,
        sequence=read.yes("parallel.seq_parallel", shape.family == "moe" or "NeMo" in read.text("software")),
        schedule="gpipe" if "gpipe" in schedule else "1f1b",
        recompute=_recompute(read),
        offload=bool(read.text("parallel.offload")),
        stages=stages,
        overlap="tp comm overlap" in read.text("parallel.overlap"),
        balanced=_balanced(read),
    )


def _recompute(read: _Reader) -> str:
    """The kind, from the sources' own words.

    >>> said = ["selective (per-op)", None, "save dots", "selective", True]
    >>> [_recompute(_Reader({"parallel": {"recompute": one}})) for one in said]
    ['alternate', 'none', 'elementwise', 'selective', 'full']
    """
    said = read.get("parallel.recompute")
    words = ("full" if said else "none") if isinstance(said, bool) else read.text("parallel.recompute", "none").lower()
    for mark, kind in _RECOMPUTED.items():
        if mark in words:
            return kind
    if words not in ("", "none", "no", "off"):
        read.assumed.append(f"parallel.recompute none: {_shown(said)} is not known")
    return "none"


def _balanced(read: _Reader) -> bool:
    """Whether embedding and head count as a layer each where layers are dealt out."""
    notes = " ".join(note for note in _list(read.get("notes")) if isinstance(note, str))
    return "embedding-balanced" in notes or "embed" in str(read.get("parallel.layer_partition"))


def _stages(read: _Reader, pp: int, layers: int) -> tuple[int, ...]:
    """Layers of each stage: from counts, or from boundaries; both count embedding and head among the layers."""
    found = _list(read.get("parallel.layer_partition"))
    if not found or not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in found):
        return ()
    if len(found) == pp + 1 and found[0] == 0 and list(found) == sorted(found):
        found = [stop - start for start, stop in pairwise(found)]
    if len(found) != pp:
        return ()
    extra = sum(found) - layers
    if extra < 0:
        return ()
    counts = list(found)
    front = min(extra // 2, counts[0])
    counts[0] -= front
    counts[-1] -= min(extra - front, counts[-1])
    return tuple(counts) if sum(counts) == layers else ()


def _batch(read: _Reader, split: Split) -> tuple[float, int]:
    """Sequences of a microbatch and microbatches of a step, from whichever of the sizes were published."""
    whole, micro, times = (read.get(f"batch.{name}") for name in ("global", "micro", "grad_accum"))
    if whole is None and (micro is None or times is None):
        read.reasons.append("batch.global is absent: it was not published")
        return 1.0, 1
    per_replica = read.number("batch.global", 0, least=0) / split.dp
    accumulated = read.number("batch.grad_accum", 0, least=0)
    size = read.number("batch.micro", 0, least=0)
    if per_replica <= 0:
        per_replica = size * max(1.0, accumulated)
    if size <= 0:
        size = per_replica / accumulated if accumulated >= 1 else per_replica
    if size > 1.5 * per_replica > 0:
        read.reasons.append(f"batch: microbatches of {size:g} on each replica are more than the whole batch of a step")
    size = min(size, per_replica)
    if size <= 0:
        read.reasons.append("batch: no sequence for a replica; batch.global, batch.micro or parallel.dp is wrong")
        return 1.0, 1
    return size, max(1, round(per_replica / size))


def _precision(read: _Reader) -> tuple[str, bool]:
    said = read.text("precision").lower()
    for words, precision in (("fp4", "fp4"), ("float8", "fp8"), ("fp8", "fp8"), ("tf32", "tf32")):
        if words in said:
            return precision, precision != "tf32"
    for precision in ("bf16", "fp16"):
        if precision in said:
            return precision, "pure" not in said
    if said not in ("", "fp32"):
        read.reasons.append(f"precision: found {said!r}, wanted fp32, tf32, fp16, bf16, fp8 or fp4")
    if not said:
        read.assumed.append("precision bf16: not published")
        return "bf16", True
    return "fp32", False


def _devices(read: _Reader) -> tuple[str, ...]:
    said = read.text("hardware.gpu")
    if not said:
        read.reasons.append("hardware.gpu is absent: it was not published")
    names = (re.sub(r"^\d+\s*x\s+|\s+x\s*\d+$|\(.*\)", "", each.strip()).strip() for each in re.split(r"[+,]", said))
    return tuple(dict.fromkeys(name for name in names if name))


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, int | float) and abs(value) > MOST:
        return "a number with too many digits" if abs(value) > 1e300 else f"{value:g}"
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:60]
