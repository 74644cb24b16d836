"""A shard's state for a checkpoint, and back: values, optimizer state, scheduler, gathered gradients."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from sheaf.errors import RunError
from sheaf.parallel.optimizers import load_named_state, named_state
from sheaf.parallel.server.clock import Clocks
from sheaf.parallel.server.dealing import Dealing
from sheaf.parallel.server.log import Member
from sheaf.parallel.server.shard import Shard
from sheaf.parallel.values import decoded, encoded
from sheaf.parallel.world import World


def kept(shard: Shard) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a later run needs: the live tensors, and values that JSON knows.

    Raises TaskError for an optimizer or scheduler that keeps what no checkpoint can hold.
    """
    tensors, optimizer = named_state(shard.optimizer, {id(value): name for name, value in shard.values.items()})
    named = {f"value/{name}": value for name, value in shard.values.items()}
    named |= {f"optimizer/{name}": value for name, value in tensors.items()}
    scheduler = None
    if shard.scheduler is not None:
        scheduler = encoded(shard.scheduler.state_dict(), type(shard.scheduler).__name__)
    gathered = 0
    if shard.buffer is not None:
        gathered = shard.buffer.gathered
        named |= {f"gathered/{name}": value for name, value in shard.buffer.sums.items()}
        named |= {f"ahead/{name}": value for name, value in shard.buffer.ahead.items()}
    dealing = shard.dealing.kept() if shard.dealing is not None else None
    return named, {"optimizer": optimizer, "scheduler": scheduler, "gathered": gathered, "dealing": dealing}


def restored(shard: Shard, tensors: dict[str, Tensor], values: dict[str, Any], index: int) -> None:
    """Put back what ``kept`` gave; every worker joins anew at step ``index``."""
    with torch.no_grad():
        for name, value in part(tensors, "value/").items():
            shard.values[name].copy_(value)
    names = {id(value): name for name, value in shard.values.items()}
    if shard.scheduler is not None:
        shard.scheduler.load_state_dict(decoded(values["scheduler"]))
    load_named_state(shard.optimizer, names, part(tensors, "optimizer/"), values["optimizer"])
    if shard.buffer is not None:
        shard.buffer.sums = {name: value.clone() for name, value in part(tensors, "gathered/").items()}
        shard.buffer.ahead = {name: value.clone() for name, value in part(tensors, "ahead/").items()}
        shard.buffer.gathered = int(values["gathered"])
    shard.forget(index)
    for member in shard.members.values():
        member.__dict__.update(Member(incarnation=member.incarnation, fenced=member.incarnation).__dict__)
    shard.clocks = Clocks(dict.fromkeys(shard.members, index), shard.terms.staleness)
    if shard.dealing is not None:
        shard.dealing = Dealing(shard.terms.workers, index)
        if values.get("dealing") is not None:  # it was not kept always
            shard.dealing.restore(values["dealing"])


def shared(
    world: World, mine: tuple[dict[str, Tensor], dict[str, Any]] | None, what: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What one worker has, on every worker (collective). Raises RunError where none or several have it."""
    count = world.summed(torch.tensor([0 if mine is None else 1]), what)
    if int(count) != 1:
        raise RunError(f"the checkpoint has {what} {int(count)} times; it was not written by a whole run")
    told = b"" if mine is None else packed(*mine)
    size = int(world.summed(torch.tensor([len(told)]), what))
    content = torch.zeros(size, dtype=torch.uint8)
    if told:
        content = torch.frombuffer(bytearray(told), dtype=torch.uint8)
    content = world.summed(content, what)
    return unpacked(content.numpy().tobytes())


def numbered(
    states: Iterable[tuple[int, tuple[dict[str, Tensor], dict[str, Any]]]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``kept`` gave of several shards, by number, as one: tensors under ``shard/NUMBER/``, the rest by number."""
    named: dict[str, Tensor] = {}
    shards: dict[str, Any] = {}
    for number, (tensors, values) in states:
        shards[str(number)] = values
        named |= {f"shard/{number}/{name}": value for name, value in tensors.items()}
    return named, shards


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins so, without that."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def packed(tensors: dict[str, Tensor], values: dict[str, Any]) -> bytes:
    """Both as the bytes of a safetensors file."""
    held = {name: value.detach().contiguous() for name, value in tensors.items()}
    return save(held, {"values": json.dumps(values)})


def unpacked(raw: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was packed."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return load(raw), json.loads(header["__metadata__"]["values"])
