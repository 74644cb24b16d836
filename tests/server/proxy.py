"""A faulty line: everything that goes through it may be delayed, sent twice, cut short, or lost with its connection."""

import contextlib
import random
import socket
import struct
import threading
import time

from sheaf.parallel.server.frame import HEAD_BYTES


class Proxy:
    """Stands before ``address``. Faults are dealt from a pack that the seed shuffles: of every 17 messages to the
    server one each is delayed, sent twice, cut in the middle, dropped with its connection, and held until one of
    another connection that came later has passed it.

    Whole messages change places between connections only. Within one, TCP itself keeps the order, and both ends build
    on it; what comes twice there comes twice in a row.
    """

    def __init__(self, address, seed):
        self.target, self.shuffling, self.losing = address, random.Random(seed), random.Random(seed)
        self.pack = []
        self.faults = {"delay": 0, "twice": 0, "cut": 0, "drop": 0, "hold": 0}
        self.passed = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.open, self.sockets, self.lock = True, [], threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self):
        return self.listener.getsockname()[:2]

    def close(self):
        self.open = False
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        with self.lock:
            for one in self.sockets:
                self._end(one)

    def _accept(self):
        while self.open:
            try:
                caller, _ = self.listener.accept()
                server = socket.create_connection(self.target)
            except OSError:
                continue
            with self.lock:
                self.sockets += [caller, server]
            threading.Thread(target=self._there, args=(caller, server), daemon=True).start()
            threading.Thread(target=self._back, args=(caller, server), daemon=True).start()

    def _there(self, caller, server):
        """Messages to the server, one by one."""
        try:
            hello = self._exactly(caller, struct.calcsize("<5sBiQ32s32s32s"))
            server.sendall(hello)
            while True:
                head = self._exactly(caller, HEAD_BYTES)
                meta, data = struct.unpack_from("<IQ", head, HEAD_BYTES - 16)
                message = head + self._exactly(caller, meta + data)
                with self.lock:
                    fault = self._dealt()
                if fault == "delay":
                    time.sleep(0.03)
                if fault == "hold":
                    until, passed = time.monotonic() + 0.05, self.passed
                    while self.passed == passed and time.monotonic() < until:
                        time.sleep(0.001)
                if fault == "drop":
                    break
                if fault == "cut":
                    server.sendall(message[: len(message) // 2])
                    break
                server.sendall(message)
                self.passed += 1
                if fault == "twice":
                    server.sendall(message)
        except OSError:
            pass
        self._end(caller)
        self._end(server)

    def _dealt(self):
        """What happens to the next message; "" for nothing. The lock is held."""
        if not self.pack:
            self.pack = [*self.faults, *[""] * 12]
            self.shuffling.shuffle(self.pack)
        fault = self.pack.pop()
        if fault:
            self.faults[fault] += 1
        return fault

    def _back(self, caller, server):
        try:
            while part := server.recv(1 << 16):
                with self.lock:
                    lost = self.losing.random() < 0.03
                if lost:  # the server did it, and the answer never comes
                    self.faults["drop"] += 1
                    break
                caller.sendall(part)
        except OSError:
            pass
        self._end(caller)
        self._end(server)

    @staticmethod
    def _exactly(connection, count):
        found = b""
        while len(found) < count:
            part = connection.recv(count - len(found))
            if not part:
                raise ConnectionError
            found += part
        return found

    @staticmethod
    def _end(connection):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
