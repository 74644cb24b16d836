"""What it takes to step an optimizer in the hosts' memory: copies both ways, and the update there.

Ren et al., 2021, "ZeRO-Offload: Democratizing Billion-Scale Model Training" (arXiv:2101.06840).
"""

from dataclasses import dataclass

from sheaf.cost.placement import Seat

COPY_BYTES_PER_SECOND = 12e9  # each way, where a host does not say: what PCIe 3 with 16 lanes reaches of 15.8e9
UPDATE_BYTES_PER_SECOND = 100e9  # of a host that does not say: four fifths of six channels of DDR4-2666, one socket
HOST_COPIES = 2  # beside its state, the host has the values that are stepped, and their gradients


@dataclass(frozen=True)
class Stepping:
    """Seconds of one worker for a byte of the parameters that it steps."""

    copying: float
    updating: float

    @property
    def together(self) -> float:
        """Both, one after the other."""
        return self.copying + self.updating

    @classmethod
    def of(cls, seat: Seat, state: float, here: float) -> "Stepping":
        """On a seat, with so many bytes of state for a byte of parameters; ``here`` is the update on the device.

        A gradient goes down and a value up. The update reads both, and state, and writes value and state; workers of a
        host share its memory. On a CPU both memories are the same: it steps as before, and the copies come on top.
        """
        if seat.device_kind == "cpu":
            return cls(4 / seat.memory_bytes_per_second, here)  # each copy reads and writes
        rate = (seat.update_bytes_per_second or UPDATE_BYTES_PER_SECOND) / seat.busy
        return cls(2 / (seat.offload_bytes_per_second or COPY_BYTES_PER_SECOND), (3 + 2 * state) / rate)
