"""A place where a shard's next backup may be: it holds nothing until the primary, having lost the other seat, comes."""

import socket
import threading
from collections.abc import Callable

import torch

from sheaf.parallel.server.door import Door
from sheaf.parallel.server.frame import BadFrame, Head, Kind, Wire
from sheaf.parallel.server.greeting import LOG, Guest
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Address, Keys
from sheaf.parallel.server.moving import unpacked_shard
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.places import Form
from sheaf.parallel.server.seats import BACKUP, Throne
from sheaf.parallel.server.shard import Shard

_MOST_STATES = 64  # times the size of a shard's values that all of its state may be


class Spare:
    """Listens for shard ``number``; ``make`` gives a fresh one to be filled. ``host`` is the seat once there is one."""

    def __init__(
        self,
        number: int,
        form: Form,
        make: Callable[[], Shard],
        listener: socket.socket,
        keys: Keys,
        throne: Throne,
        peers: Peers,
        lease_seconds: float,
    ) -> None:
        self.number, self.host = number, None
        self._make, self._keys, self._throne = make, keys, throne
        self.peers = peers
        self._changed = threading.Condition()
        self._most = (1 << 20) + _MOST_STATES * form.size_bytes
        self.recruits: list[Address] = []
        self._closed = False
        self.door = Door(listener, keys, f"sheaf-spare-{number}", form.size_bytes, lease_seconds)

    host: Host | None

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self.door.address

    def open(self) -> None:
        """Begin to answer: that the shard is elsewhere, until it is here."""
        self.door.open(self._serve, self._changed)

    def close(self) -> None:
        """Stop answering."""
        with self._changed:
            self._closed = True
            host = self.host
        if host is not None:
            host.close()  # before its log breaks, or it would take that for the primary's loss
            return
        self.door.close()
        self.peers.close()

    def join(self, until: float | None = None) -> bool:
        """After ``close``: wait until nothing is done here any more, or until then; whether that came to be."""
        return self.door.threads.join(until)

    def _serve(self, wire: Wire, guest: Guest) -> None:
        if self.host is None and guest.role == LOG:
            self._take_over(wire)
        while self.host is None:
            head = wire.head()
            wire.meta(head)
            wire.skip(head)
            if self.host is None:
                wire.send(Head(Kind.ELSEWHERE, request=head.request))
            else:
                return  # it came to be here: whoever asked asks again
        self.host.serve(wire, guest)

    def _take_over(self, wire: Wire) -> None:
        """Receive the shard, and be its backup from then on."""
        state, total = bytearray(), -1
        while len(state) != total:
            head = wire.head()
            meta = wire.meta(head)
            if head.kind == Kind.MOVE:
                total, generation = self._checked(meta, len(state), head.data_bytes)
                part = bytearray(head.data_bytes)
                wire.data(head, memoryview(part))
                state += part
                if len(state) == total:
                    self._become(bytes(state), generation)
            elif head.kind != Kind.BEAT:
                raise BadFrame(f"a {head.kind.name} came to a seat that has no shard yet")
            wire.send(Head(Kind.ACK, request=head.request))

    def _become(self, state: bytes, generation: int) -> None:
        with torch.no_grad():
            shard = self._make()
            unpacked_shard(shard, state)
        with self._changed:
            if self.host is not None or self._closed:
                raise BadFrame("another primary came first")
            self._throne.generation = generation
            host = Host(shard, BACKUP, self.door, self._keys, self._throne, self.peers, self._changed)
            host.recruits = self.recruits
            self.host = host
        host.begin()

    def _checked(self, meta: dict[str, object], have: int, size: int) -> tuple[int, int]:
        start, total, generation = meta.get("start"), meta.get("total"), meta.get("generation")
        if type(start) is not int or type(total) is not int or type(generation) is not int:
            raise BadFrame("a part of a shard does not tell where it belongs")
        if start != have or not 0 < size <= total - have or total > self._most or generation < 1:
            raise BadFrame(f"bytes {start} to {start + size} of {total} came where {have} are, of {self._most} at most")
        return total, generation
