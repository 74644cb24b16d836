"""Reduce-scatter and all-gather by whichever primitive is fastest on the backend; started, then waited for.

On gloo, torch 2.13 reduces and scatters by one all-reduce per rank, and gathers through an extra flat copy. Pairwise
sends and receives with a local sum are two to four times faster (``sheaf measure`` prints the figures), and need no
thread of their own. Every other backend gets its native collective, but for parts that differ. ``start_*`` return at
once; the plain names wait.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sheaf.cluster.traffic import traffic


class Pending:
    """A collective under way; its output may be read after ``wait``."""

    def __init__(self, works: list[dist.Work], finish: Callable[[], object] | None = None) -> None:
        self._works, self._finish = works, finish

    def then(self, finish: Callable[[], object]) -> "Pending":
        """The same, with something that ``wait`` does once it is done; other collectives, perhaps."""
        before = self._finish

        def both() -> None:
            if before is not None:
                before()
            finish()

        self._finish = both
        return self

    @property
    def done(self) -> bool:
        """Whether its messages have come; of those between pairs gloo knows that only after ``wait``."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Block until it is done. Raises RuntimeError when a peer is gone or the time-out has passed."""
        for work in self._works:
            work.wait()
        self._works = []
        if self._finish is not None:
            self._finish()
            self._finish = None


def start_reduce_scatter(
    output: Tensor, given: Tensor, group: dist.ProcessGroup | None = None, sizes: Sequence[int] = ()
) -> Pending:
    """``output`` (k elements) becomes this rank's k-th part of the sum of all ranks' ``given`` (ranks * k elements).

    With ``sizes``, the same on all ranks, parts have so many elements by rank. Where they differ they go pairwise on
    every backend, in as many messages. Pairwise the parts are added in rank order, so the sum does not depend on what
    arrived first; ``given`` must stay as it is until then, and not be where ``output`` is. Raises ValueError when the
    sizes do not fit.
    """
    rank, sizes = dist.get_rank(group), _fitting(output, given, group, sizes)
    if _native(given, group, sizes):
        traffic.collective("reduce_scatter", given.nbytes, len(sizes))
        return Pending([_work(dist.reduce_scatter_tensor(output, given, group=group, async_op=True))])
    parts = given.view(-1).split(sizes)
    others = given.new_empty(len(sizes) - 1, output.numel()).unbind()
    received = [*others[:rank], parts[rank], *others[rank:]]
    return start_swap(received, parts, group).then(lambda: _add(received, output.view(-1)))


def start_all_gather(
    output: Tensor, given: Tensor, group: dist.ProcessGroup | None = None, sizes: Sequence[int] = ()
) -> Pending:
    """``output`` (ranks * k elements) becomes every rank's ``given`` (k elements) in rank order.

    ``given`` may be this rank's own part of ``output``. ``sizes`` as for ``start_reduce_scatter``. Raises ValueError
    when the sizes do not fit.
    """
    rank, sizes = dist.get_rank(group), _fitting(given, output, group, sizes)
    if _native(given, group, sizes):
        traffic.collective("all_gather", output.nbytes, len(sizes))
        return Pending([_work(dist.all_gather_into_tensor(output, given, group=group, async_op=True))])
    parts = output.view(-1).split(sizes)
    if parts[rank].data_ptr() != given.data_ptr():
        parts[rank].copy_(given.view(-1))
    return start_swap(parts, [given.view(-1)] * len(sizes), group)


def start_all_to_all(received: Tensor, given: Tensor, group: dist.ProcessGroup | None = None) -> Pending:
    """Row i of ``received`` (ranks, k) becomes rank i's row of ``given`` (ranks, k) that is this rank's.

    Raises ValueError when the sizes do not fit.
    """
    rank, sizes = dist.get_rank(group), _fitting(given[0], received, group)
    if _native(given, group, sizes):
        traffic.collective("all_to_all", given.nbytes, len(sizes))
        return Pending([_work(dist.all_to_all_single(received, given, group=group, async_op=True))])
    received[rank].copy_(given[rank])
    return start_swap(list(received), list(given), group)


def start_all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Pending:
    """``tensor`` becomes the sum of all ranks' ``tensor``."""
    traffic.collective("all_reduce", tensor.nbytes, dist.get_world_size(group), gloo=_pairwise(tensor, group))
    return Pending([_work(dist.all_reduce(tensor, group=group, async_op=True))])


def start_swap(received: Sequence[Tensor], given: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Pending:
    """``received[i]`` becomes what rank i gives this one of its ``given``, for every other rank; tensors as in a trade.

    Each rank starts with another neighbour, so that none is everyone's first target.
    """
    rank, ranks = dist.get_rank(group), len(given)
    later = [(rank + distance) % ranks for distance in range(1, ranks)]
    before = [(rank - distance) % ranks for distance in range(1, ranks)]
    return start_trade([(given[to], to) for to in later], [(received[origin], origin) for origin in before], group)


def start_trade(
    sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]], group: dist.ProcessGroup | None = None
) -> Pending:
    """Messages between some of the ranks: each tensor with whom it goes to, or comes from.

    Tensors are one-dimensional and contiguous; empty ones are left out, on both sides.
    """
    on_gloo = sum(_pairwise(one, group) for one, _ in sent if one.numel())
    traffic.message(sum(one.nbytes for one, _ in sent), gloo=on_gloo)
    # Receives first: gloo announces one on the line on which it sends, and behind a long send the other side would wait
    # for it, so that a link which carries both ways at once carried one after the other.
    operations = [dist.P2POp(dist.irecv, one, group=group, group_peer=of) for one, of in received if one.numel()]
    operations += [dist.P2POp(dist.isend, one, group=group, group_peer=to) for one, to in sent if one.numel()]
    return Pending(dist.batch_isend_irecv(operations) if operations else [])


def reduce_scatter(output: Tensor, given: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """``start_reduce_scatter``, and wait."""
    start_reduce_scatter(output, given, group).wait()


def all_gather(output: Tensor, given: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """``start_all_gather``, and wait."""
    start_all_gather(output, given, group).wait()


def _add(parts: Sequence[Tensor], out: Tensor) -> None:
    """The sum of all parts, one after the other: what ``torch.sum`` gives for up to four, without laying them out."""
    if len(parts) == 1:
        out.copy_(parts[0])
        return
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)


def backends() -> dict[str, str]:
    """By type of device, the backend that carries its tensors in the default process group; {} where one is alone."""
    if not dist.is_available() or dist.group.WORLD is None or dist.get_world_size() == 1:
        return {}
    return dict(pair.split(":") for pair in dist.get_backend_config().split(","))


def carried_accelerator() -> torch.device | None:
    """The accelerator, without an index; None where there is none, or the default process group has gloo alone.

    So it is where workers are more than a machine's accelerators: they compute on CPUs.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    known = backends()
    shared = bool(known) and found is not None and known.get(found.type, "gloo") == "gloo"
    return None if shared else found


def _pairwise(tensor: Tensor, group: dist.ProcessGroup | None) -> bool:
    return tensor.device.type == "cpu" and "gloo" in dist.get_backend(group)


def _native(tensor: Tensor, group: dist.ProcessGroup | None, sizes: Sequence[int]) -> bool:
    """Whether the backend's own collective is called: it knows equal parts only."""
    return len(sizes) > 1 and len(set(sizes)) == 1 and not _pairwise(tensor, group)


def _work(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise RuntimeError("this process is not in the group of the collective")
    return work


def _fitting(part: Tensor, whole: Tensor, group: dist.ProcessGroup | None, sizes: Sequence[int] = ()) -> list[int]:
    """Elements of every rank's part: equal parts where no ``sizes`` are given."""
    # gloo ends the process, with no exception, on a message of another length than expected
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(sizes) not in (0, ranks) or (sizes and sizes[rank] != part.numel()):
        raise ValueError(
            f"rank {rank} of {ranks} has a part of {part.numel()} elements, and sizes by rank are {sizes}: give every "
            "part's size, this rank's too"
        )
    found = list(sizes) or [part.numel()] * ranks
    if sum(found) != whole.numel() or part.dtype != whole.dtype:
        raise ValueError(
            f"parts of {', '.join(map(str, found))} {part.dtype} elements do not make {whole.numel()} of "
            f"{whole.dtype}: pad the whole to a multiple of the ranks, or give every part's size, and use one dtype"
        )
    if not (part.is_contiguous() and whole.is_contiguous()):
        raise ValueError("a strided tensor cannot be sent in place: call contiguous() first")
    return found
