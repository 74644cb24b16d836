"""Rows of tables asked for and given between workers, over sockets, as they stand after so many updates.

A worker gives rows of version v once it has made v updates, so what is asked for ahead of an update waits for it at
the owner, and nothing stale is ever given. Framing, greeting and token are those of the parameter server.
"""

import contextlib
import queue
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from sheaf.errors import WorkerFailed
from sheaf.parallel.rows.meeting import Form
from sheaf.parallel.server.door import Door
from sheaf.parallel.server.frame import BadFrame, Head, Kind, Wire
from sheaf.parallel.server.greeting import WORKER, Guest, Refused, greet
from sheaf.parallel.server.link import Address, Keys

_CONNECT_SECONDS, _CLOSE_SECONDS = 30.0, 5.0


class Owner:
    """Gives rows of this worker's ``blocks`` (by table, in the order of ``forms``) to who asks."""

    def __init__(
        self, listener: socket.socket, keys: Keys, forms: Sequence[Form], blocks: Sequence[Tensor], rank: int
    ) -> None:
        self._forms, self._blocks = forms, blocks
        self._firsts = [form.starts[rank] for form in forms]
        self._changed = threading.Condition()
        self._closed = False
        self.version = 0
        most = sum(form.rows for form in forms) * 8
        self._door = Door(listener, keys, f"sheaf-rows-{rank}", most, _CONNECT_SECONDS)
        self._door.open(self._serve, self._changed)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._door.address

    def updated(self) -> None:
        """The blocks are those of the next version."""
        with self._changed:
            self.version += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Stop giving."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._door.close()
        self._door.threads.join()

    def rows(self, table: int, ids: Tensor) -> Tensor:
        """Rows that this worker holds, by their ids in the whole table."""
        return self._blocks[table].detach().index_select(0, ids - self._firsts[table])

    def _serve(self, wire: Wire, _guest: Guest) -> None:
        while True:
            head = wire.head()
            counts = wire.meta(head).get("counts")
            if head.kind != Kind.READ or not _are_counts(counts, len(self._forms), head.data_bytes):
                raise BadFrame("a worker asked for something else than rows of tables")
            asked = torch.empty(head.data_bytes // 4, dtype=torch.int32)
            wire.data(head, _raw(asked))
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.version >= head.clock)  # noqa: B023
                closed, late = self._closed, self.version > head.clock
            if closed:
                return
            if late:
                wire.send(Head(Kind.FAILED, request=head.request))
                continue
            found = [self._found(table, ids) for table, ids in enumerate(asked.long().split(counts))]
            wire.send(Head(Kind.VALUES, request=head.request), None, _raw(torch.cat(found)))

    def _found(self, table: int, ids: Tensor) -> Tensor:
        block, first = self._blocks[table], self._firsts[table]
        if ids.numel() and not (first <= int(ids.min()) and int(ids.max()) < first + block.shape[0]):
            raise BadFrame(f"a worker asked for rows of {self._forms[table].name} that are not here")
        return self.rows(table, ids.to(block.device)).cpu().contiguous().view(-1).view(torch.uint8)


class Line:
    """What this worker asks one owner, one request after the other, in a thread of its own."""

    def __init__(self, owner: int, address: Address, me: int, keys: Keys, forms: Sequence[Form]) -> None:
        self._owner, self._address, self._guest, self._keys, self._forms = (
            owner,
            address,
            Guest(WORKER, me, 0),
            keys,
            forms,
        )
        self._asked: queue.SimpleQueue[tuple[int, list[Tensor], Future[list[Tensor]]] | None] = queue.SimpleQueue()
        self._wire: Wire | None = None
        self._closed, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"sheaf-rows-of-{owner}", daemon=True)
        self._thread.start()

    def ask(self, version: int, ids: list[Tensor]) -> "Future[list[Tensor]]":
        """Rows by table, on the CPU, as they are after ``version`` updates. The future may raise WorkerFailed."""
        come: Future[list[Tensor]] = Future()
        self._asked.put((version, ids, come))
        return come

    def close(self) -> None:
        """Ask no more; what has not come never will."""
        with self._lock:
            self._closed = True
            if self._wire is not None:
                self._wire.close()
        self._asked.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            version, ids, come = asked
            try:
                come.set_result(self._answer(version, ids))
            except (OSError, BadFrame, Refused) as error:
                come.set_exception(
                    WorkerFailed(f"worker {self._owner}, which holds rows of {self._forms[0].name}, is lost: {error}")
                )

    def _answer(self, version: int, ids: list[Tensor]) -> list[Tensor]:
        wire = self._wire or self._connected()
        counts = [one.numel() for one in ids]
        wire.send(Head(Kind.READ, clock=version), {"counts": counts}, _raw(torch.cat(ids).to("cpu", torch.int32)))
        head = wire.head()
        if head.kind != Kind.VALUES:
            wire.skip(head)
            raise BadFrame("its rows are newer than those asked for")
        sizes = [count * form.width * form.dtype.itemsize for count, form in zip(counts, self._forms, strict=True)]
        room = torch.empty(sum(sizes), dtype=torch.uint8)
        wire.data(head, _raw(room))
        return [
            part.clone().view(form.dtype).view(-1, form.width)
            for part, form in zip(room.split(sizes), self._forms, strict=True)
        ]

    def _connected(self) -> Wire:
        connection = socket.create_connection(self._address, timeout=_CONNECT_SECONDS)
        try:
            greet(connection, self._guest, self._keys.token, self._keys.digest)
            with contextlib.suppress(OSError, AttributeError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        except BaseException:
            connection.close()
            raise
        most = sum(form.rows * form.width * form.dtype.itemsize for form in self._forms)
        wire = Wire(connection, most_data_bytes=most, silence_seconds=None)
        with self._lock:
            self._wire = wire
            if self._closed:
                wire.close()
        return wire


def _are_counts(told: Any, tables: int, data_bytes: int) -> bool:
    whole = isinstance(told, list) and len(told) == tables and all(type(one) is int and one >= 0 for one in told)
    return whole and 4 * sum(told) == data_bytes


def _raw(tensor: Tensor) -> memoryview:
    raw: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(raw)
