"""Facts and profiles for the microbatch size and company of a plan, from those that were traced and measured."""

from collections.abc import Mapping

from sheaf.graph.facts import BlockTime, ModelFacts, Profile

Profiles = Mapping[tuple[int, int], Profile]  # by (samples per microbatch, busy workers per host)


def facts_for(facts: Mapping[int, ModelFacts], samples: int) -> ModelFacts:
    """The facts of that size, or of the nearest (by ratio); prices scale them."""
    if samples in facts:
        return facts[samples]
    return facts[min(facts, key=lambda size: (max(size, samples) / min(size, samples), size))]


def profile_for(profiles: Profiles, samples: int, busy: int) -> Profile | None:
    """The profile for that size and company; None without any.

    Of worker counts, the measured one, else the next larger, else the largest. Between two measured sizes times are
    interpolated; outside them the nearest is given, and prices scale it.
    """
    if not profiles:
        return None
    counts = sorted({count for _, count in profiles})
    count = min((known for known in counts if known >= busy), default=counts[-1])
    sizes = sorted(size for size, known in profiles if known == count)
    below = max((size for size in sizes if size <= samples), default=None)
    above = min((size for size in sizes if size >= samples), default=None)
    if below is None or above is None or below == above:
        nearest = below if below is not None else above
        assert nearest is not None
        return profiles[nearest, count]
    return _between(profiles[below, count], profiles[above, count], samples)


def _between(low: Profile, high: Profile, samples: int) -> Profile:
    part = (samples - low.samples) / (high.samples - low.samples)

    def mixed(first: float, second: float) -> float:
        return first + part * (second - first)

    return Profile(
        samples=samples,
        concurrency=low.concurrency,
        threads=low.threads,
        precision=low.precision,
        blocks={
            name: BlockTime(
                mixed(time.forward_seconds, high.blocks[name].forward_seconds),
                mixed(time.backward_seconds, high.blocks[name].backward_seconds),
            )
            for name, time in low.blocks.items()
            if name in high.blocks
        },
        optimizer_seconds_per_byte=mixed(low.optimizer_seconds_per_byte, high.optimizer_seconds_per_byte),
        optimizer_state_bytes_per_byte=low.optimizer_state_bytes_per_byte,
        fetch_seconds=mixed(low.fetch_seconds, high.fetch_seconds),
        host_seconds=mixed(low.host_seconds, high.host_seconds),
        exposed_seconds=mixed(low.exposed_seconds, high.exposed_seconds),
        uneven_seconds=mixed(low.uneven_seconds, high.uneven_seconds),
        collective_factor=mixed(low.collective_factor, high.collective_factor),
        overheads={text: mixed(more, high.overheads.get(text, more)) for text, more in low.overheads.items()},
        cores_taken=max(low.cores_taken, high.cores_taken),
    )
