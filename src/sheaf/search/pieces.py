"""Facts and times for plans whose stages begin inside of blocks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sheaf.graph.facts import BlockTime, ModelFacts, Profile, within


@dataclass(frozen=True)
class Pieces:
    """A model's facts in which some blocks gave way to what they are made of, and what those pieces take."""

    facts: ModelFacts
    times: Mapping[str, BlockTime]

    def profile(self, whole: Profile | None) -> Profile | None:
        """A profile of the whole blocks as one of these pieces."""
        if whole is None:
            return None
        return replace(whole, blocks=shared_out(whole.blocks, together(self.facts, self.times)))


def shared_out(whole: Mapping[str, BlockTime], pieces: Mapping[str, BlockTime]) -> dict[str, BlockTime]:
    """The times of whole blocks, of which those that ``pieces`` does not name are shared out as its times say.

    >>> times = shared_out({"a": BlockTime(2.0, 8.0)}, {"a.0": BlockTime(1.0, 1.0), "a.1": BlockTime(3.0, 1.0)})
    >>> times["a.0"]
    BlockTime(forward_seconds=0.5, backward_seconds=4.0)
    """
    found = {name: time for name, time in whole.items() if name in pieces}
    for name, time in whole.items():
        inside = {piece: pieces[piece] for piece in pieces if piece not in whole and within(piece, name)}
        if name in pieces or not inside:
            continue
        counted = _sum(inside.values())
        for piece, one in inside.items():
            found[piece] = BlockTime(
                time.forward_seconds * one.forward_seconds / (counted.forward_seconds or 1.0),
                time.backward_seconds * one.backward_seconds / (counted.backward_seconds or 1.0),
            )
    return found


def together(facts: ModelFacts, pieces: Mapping[str, BlockTime]) -> dict[str, BlockTime]:
    """What the blocks of these facts take: as ``pieces`` say, or what lies inside of them there."""
    return {
        block.name: pieces.get(block.name) or _sum(time for name, time in pieces.items() if within(name, block.name))
        for block in facts.blocks
    }


def _sum(times: Iterable[BlockTime]) -> BlockTime:
    found = list(times)
    return BlockTime(
        sum((one.forward_seconds for one in found), 0.0), sum((one.backward_seconds for one in found), 0.0)
    )
