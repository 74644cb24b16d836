"""What a training run is, as values: the model's shape, how it is split, what it ran on."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model by its sizes. A transformer has ``layers``; a convolutional net is known by ``network`` instead."""

    family: str
    layers: int = 0
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_width: int = 0
    ffn: int = 0
    vocabulary: int = 0
    sequence: int = 1
    gated: bool = False
    causal: bool = True
    latent: bool = False  # attention through low ranks (DeepSeek-AI 2024)
    window: int = 0  # tokens that every second layer's attention reaches back; 0: all
    biased: bool = False  # experts have biases and a clamped activation, each a kernel of its own
    ahead: int = 0  # tokens predicted beyond the next, each by one more layer and head (DeepSeek-AI 2024)
    tied: bool = True  # the output projection is the embedding
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    expert_layers: int = 0
    network: str = ""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a published run was split: wider than a ``Plan``, by experts, groups of shards and offload."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    virtual: int = 1
    zero: int = 0
    shards: int = 1  # workers that one copy of what ZeRO cuts is spread over
    sequence: bool = False  # norms and dropout split by sequence too (Korthikanti et al. 2022)
    schedule: str = "1f1b"
    recompute: str = "none"  # none, selective (attention), latent (projections from low ranks), elementwise,
    # alternate (half the products), full
    offload: bool = False  # optimizer state in the hosts' memory
    stages: tuple[int, ...] = ()  # transformer layers of each stage where published
    balanced: bool = False  # embedding and head count as a layer each where layers are dealt out to stages
    overlap: bool = False  # tensor-parallel communication is said to run beside computation

    @property
    def workers(self) -> int:
        """All workers."""
        return self.dp * self.tp * self.pp * self.cp


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One published run: what is trained, how it is split, and on what."""

    id: str
    shape: Shape
    split: Split
    micro: float  # sequences of one microbatch
    accumulated: int  # microbatches of one replica and step
    precision: str  # of matrix products: fp32, tf32, fp16, bf16, fp8, fp4
    mixed: bool  # masters are fp32 beside copies in the precision
    devices: tuple[str, ...]
    workers: int
    workers_per_host: int
    intra_bytes_per_second: float = 0.0  # of one worker, one direction; 0: what the machine's file says
    inter_bytes_per_second: float = 0.0  # of one host
    model: str = ""  # its name, in the source's words
    software: str = ""  # where it was published and what ran, in the source's words
    adapters: bool = False  # only low-rank adapters are trained (Hu et al. 2021)
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()  # what the run does not say and was filled in
