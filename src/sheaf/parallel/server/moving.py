"""All of a shard as bytes, and back: what a seat is given that takes over in the middle of a run.

Values, optimizer and scheduler as in a checkpoint, and besides all that decides what counts: who has sent what, what is
kept of the step under way, and what was told of the last ones.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sheaf.parallel.server.clock import Clocks
from sheaf.parallel.server.frame import Kind
from sheaf.parallel.server.log import Entry, Member
from sheaf.parallel.server.places import Arena, Form
from sheaf.parallel.server.restore import kept, packed, part, restored, unpacked
from sheaf.parallel.server.shard import Shard
from sheaf.parallel.server.work import Round


class _Entries:
    """Entries of the log with their data: a list of values, and tensors by place in it."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self.values: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}

    def put(self, entry: Entry | None) -> int | None:
        """Keep one; its place."""
        if entry is None:
            return None
        if entry.arena is not None:
            self.tensors[f"entry/{len(self.values)}"] = _bytes(entry.arena)
        fields = {name: getattr(entry, name) for name in ("worker", "incarnation", "sequence", "clock", "base", "meta")}
        self.values.append({"kind": int(entry.kind), **fields})
        return len(self.values) - 1

    def get(self, place: int | None) -> Entry | None:
        """The one of that place."""
        if place is None:
            return None
        value = dict(self.values[place])
        arena = None
        if (raw := self.tensors.get(f"entry/{place}")) is not None:
            arena = _arena(self._form, raw)
        return Entry(Kind(value.pop("kind")), arena=arena, **value)


def packed_shard(shard: Shard) -> bytes:
    """The shard as it is; nothing may have been added up that is not applied yet."""
    tensors, values = kept(shard)
    entries = _Entries(shard.form)
    members = {
        worker: {
            **{name: getattr(member, name) for name in _OF_MEMBER},
            "staged": entries.put(member.staged),
            "history": member.history,
        }
        for worker, member in shard.members.items()
    }
    state: dict[str, Any] = {
        "kept": values,
        "members": members,
        "clocks": {worker: shard.clocks.of(worker) for worker in shard.clocks.workers},
        "round": {place: entries.put(entry) for place, entry in shard.round.items()},
        "pulled": {worker: sequence for worker, (sequence, _) in shard.pulled.items()},
        **{name: getattr(shard, name) for name in _PLAIN},
    }
    if shard.kept is not None:
        state["lent"] = {
            "pushes": [[*key, entries.put(entry)] for key, entry in shard.kept.pushes.items()],
            "round": None if shard.kept.round is None else _told_round(shard.kept.round),
            "counted": shard.kept.counted,
        }
    if shard.dealing is not None:
        state["dealing"] = shard.dealing.moved()
    state["entries"] = entries.values
    tensors |= entries.tensors
    tensors |= {f"pulled/{worker}": _bytes(arena) for worker, (_, arena) in shard.pulled.items()}
    tensors |= {f"watched/{name}": value for name, value in shard.watched.items()}
    return packed(tensors, state)


_OF_MEMBER = ("incarnation", "fenced", "committed", "abandoned", "left")
_PLAIN = ("version", "applied", "scheduled", "told", "norms", "whole_norms", "failure", "stop_at")


def unpacked_shard(shard: Shard, raw: bytes) -> None:
    """Make a fresh shard of the same form and terms what the packed one was."""
    tensors, state = unpacked(raw)
    restored(shard, tensors, state["kept"], 0)
    entries = _Entries(shard.form)
    entries.values, entries.tensors = state["entries"], tensors
    for worker, values in _by_number(state["members"]).items():
        shard.members[worker] = Member(
            **{name: values[name] for name in _OF_MEMBER},
            staged=entries.get(values["staged"]),
            history=_by_number(values["history"]),
        )
    shard.clocks = Clocks(_by_number(state["clocks"]), shard.terms.staleness)
    if shard.dealing is not None:
        shard.dealing.restore(state["dealing"])
    for name in _PLAIN:
        value = state[name]
        setattr(shard, name, _by_number(value) if name in ("told", "norms", "whole_norms") else value)
    shard.told = {clock: _by_number(each) for clock, each in shard.told.items()}
    shard.round = {place: _there(entries.get(one)) for place, one in _by_number(state["round"]).items()}
    shard.pulled = {
        worker: (sequence, _arena(shard.form, tensors[f"pulled/{worker}"]))
        for worker, sequence in _by_number(state["pulled"]).items()
    }
    shard.watched = {name: value.clone() for name, value in part(tensors, "watched/").items()}
    if shard.kept is not None:
        lent = state["lent"]
        shard.kept.pushes = {(key[0], key[1], key[2]): _there(entries.get(one)) for *key, one in lent["pushes"]}
        shard.kept.round = None if lent["round"] is None else _round(lent["round"])
        shard.kept.counted = {
            clock: [(key[0], key[1], key[2]) for key in keys] for clock, keys in _by_number(lent["counted"]).items()
        }


def _told_round(round_: Round) -> dict[str, Any]:
    return asdict(round_)


def _round(told: dict[str, Any]) -> Round:
    return Round(
        told["count"],
        _by_number(told["lent"]),
        {index: (key[0], key[1], key[2]) for index, key in _by_number(told["covered"]).items()},
        [(key[0], key[1], key[2]) for key in told["counted"]],
        _by_number(told["returned"]),
        told["stop"],
    )


def _by_number(told: Mapping[Any, Any]) -> dict[int, Any]:
    """JSON's keys are text."""
    return {int(key): value for key, value in told.items()}


def _there(entry: Entry | None) -> Entry:
    assert entry is not None
    return entry


def _bytes(arena: Arena) -> Tensor:
    return torch.frombuffer(bytearray(arena.raw), dtype=torch.uint8)


def _arena(form: Form, raw: Tensor) -> Arena:
    arena = Arena(form)
    torch.frombuffer(arena.raw, dtype=torch.uint8).copy_(raw)
    return arena
