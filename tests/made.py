"""Hand-made facts, clusters and profiles for the deciding wing's tests."""

from sheaf.cluster.cluster import Cluster, Device, Host, Link
from sheaf.graph.facts import GLUE, LOSS, BlockFact, BlockTime, BufferFact, ModelFacts, ParameterFact, Profile
from sheaf.plans.split import Cut, Move, Slice, SplitFacts


def facts(
    blocks: int = 4,
    block_elements: int = 250_000,
    *,
    samples: int = 4,
    saved_bytes: int = 1_000_000,
    flops: float = 1e9,
    draws: tuple[str, ...] = (),
    batch_dependent: tuple[str, ...] = (),
    buffers: tuple[BufferFact, ...] = (),
    glue_elements: int = 0,
) -> ModelFacts:
    parameters = [ParameterFact(f"b{i}.weight", (block_elements,), "float32", 4, True) for i in range(blocks)]
    if glue_elements:
        parameters.append(ParameterFact("glue", (glue_elements,), "float32", 4, True))
    made = [_block(f"b{i}", (f"b{i}.weight",), flops, saved_bytes, block_elements * 4) for i in range(blocks)]
    made.append(_block(GLUE, ("glue",) if glue_elements else (), 0.0, 0, glue_elements * 4))
    made.append(_block(LOSS, (), flops / 10, 1000, 0))
    return ModelFacts(samples, tuple(made), tuple(parameters), buffers, draws, batch_dependent, batch_bytes=4096)


def _block(name: str, parameters: tuple[str, ...], flops: float, saved_bytes: int, parameter_bytes: int) -> BlockFact:
    return BlockFact(
        name=name,
        kind="Block",
        parameters=parameters,
        forward_flops=flops,
        backward_flops=2 * flops,
        forward_bytes=1e6,
        backward_bytes=2e6,
        forward_kernels=10,
        backward_kernels=20,
        saved_bytes=saved_bytes,
        input_bytes=50_000,
        output_bytes=50_000,
        parameter_bytes=parameter_bytes,
        signature="same",
        saved_input_bytes=50_000,
        fresh_input_bytes=50_000,
    )


def cluster(
    workers: int = 4,
    *,
    bytes_per_second: float = 1e9,
    latency_seconds: float = 1e-4,
    memory_bytes: int = 2**34,
    hosts: int = 1,
    speeds: tuple[float, ...] = (),
    overlap: float = 0.5,
    flops_per_second: float = 1e11,
    inter_bytes_per_second: float = 1e8,
) -> Cluster:
    """Hosts with one accelerator per worker, equally fast or with the given speeds."""
    device = Device(
        name="made",
        kind="cuda",
        flops_per_second={"fp32": flops_per_second},
        memory_bytes_per_second=1e11,
        memory_bytes=memory_bytes,
        kernel_seconds=1e-6,
    )
    kinds = [(1.0, hosts)] if not speeds else [(speed, 1) for speed in speeds]
    return Cluster(
        name="made",
        backend="nccl",
        hosts=tuple(
            Host(name=f"host{i}", count=count, workers=workers, device=device, cores=8, memory_bytes=2**36, speed=speed)
            for i, (speed, count) in enumerate(kinds)
        ),
        intra=Link(name="inside", latency_seconds=latency_seconds, bytes_per_second=bytes_per_second),
        inter=Link(name="between", latency_seconds=latency_seconds, bytes_per_second=inter_bytes_per_second),
        overlap=overlap,
    )


def profile(facts: ModelFacts, *, concurrency: int = 1, block_seconds: float = 0.01) -> Profile:
    return Profile(
        samples=facts.samples,
        concurrency=concurrency,
        threads=1,
        precision="fp32",
        blocks={block.name: BlockTime(block_seconds, 2 * block_seconds) for block in facts.blocks},
        optimizer_seconds_per_byte=1e-9,
        optimizer_state_bytes_per_byte=2.0,
        fetch_seconds=1e-3,
        host_seconds=2e-3,
    )


def sequences(facts: ModelFacts, degree: int) -> SplitFacts:
    """Sequences split among workers: every block gathers its output, and again backward, where gradients are summed."""
    blocks = [block for block in facts.blocks if block.name != GLUE]
    inner = [block for block in blocks if block.name != LOSS]
    moves = [
        Move(block.name, operation, block.output_bytes, backward=backward, why="whole for attention")
        for block in inner
        for operation, backward in (("all_gather", False), ("all_gather", True), ("reduce_scatter", True))
    ]
    trades = [Move(block.name, "trade", block.output_bytes // 4, backward=False, why="queries") for block in inner]
    shares = {block.name: 1 / degree for block in blocks}
    return SplitFacts(degree, facts.samples, {}, (*moves, *trades), work=shares, activations=shares)


def split(facts: ModelFacts, degree: int, *, kept: float = 0.6) -> SplitFacts:
    """Every block of the facts split: one all-reduce of its output, and one of its input's gradient."""
    blocks = [block for block in facts.blocks if block.name not in (GLUE, LOSS) and block.parameters]
    return SplitFacts(
        degree=degree,
        samples=facts.samples,
        slices={
            name: Slice(0, Cut.even(facts.parameter(name).shape[0], degree))
            for block in blocks
            for name in block.parameters
        },
        moves=(
            *(Move(block.name, "all_reduce", block.output_bytes, backward=False, why="its output") for block in blocks),
            *(Move(block.name, "all_reduce", block.input_bytes, backward=True, why="its input") for block in blocks),
        ),
        work={block.name: 1 / degree for block in blocks},
        activations={block.name: kept for block in blocks},
    )
