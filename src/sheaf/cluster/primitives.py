"""Reduce-scatter and all-gather by whichever primitive is fastest on the backend; started, then waited for.

On gloo, torch 2.13 reduces and scatters by one all-reduce per rank, and gathers through an extra flat copy. Pairwise
sends and receives with a local sum are two to four times faster (``sheaf measure`` prints the figures), and need no
thread of their own. Every other backend gets its native collective. ``start_*`` return at once; the plain names wait.
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

    def wait(self) -> None:
        """Block until it is done. Raises RuntimeError when a peer is gone or the time-out has passed."""
        for work in self._works:
            work.wait()
        self._works = []
        if self._finish is not None:
            self._finish()
            self._finish = None


def start_reduce_scatter(output: Tensor, given: Tensor, group: dist.ProcessGroup | None = None) -> Pending:
    """``output`` (k elements) becomes this rank's k-th part of the sum of all ranks' ``given`` (ranks * k elements).

    On gloo the parts are added in rank order, so the sum does not depend on what arrived first. Raises ValueError
    when the sizes do not fit.
    """
    ranks = dist.get_world_size(group)
    _require_fit(part=output, whole=given, ranks=ranks)
    traffic.collective("reduce_scatter", given.nbytes, ranks, gloo=_pairwise(given, group))
    if ranks > 1 and not _pairwise(given, group):
        return Pending([_work(dist.reduce_scatter_tensor(output, given, group=group, async_op=True))])
    rank = dist.get_rank(group)
    parts = given.view(ranks, -1)
    received = torch.empty_like(parts)
    works = _exchange(list(parts), list(received), rank, group)
    received[rank].copy_(parts[rank])
    return Pending(works, lambda: torch.sum(received, 0, out=output.view(-1)))


def start_all_gather(output: Tensor, given: Tensor, group: dist.ProcessGroup | None = None) -> Pending:
    """``output`` (ranks * k elements) becomes every rank's ``given`` (k elements) in rank order.

    ``given`` may be this rank's own part of ``output``. Raises ValueError when the sizes do not fit.
    """
    ranks = dist.get_world_size(group)
    _require_fit(part=given, whole=output, ranks=ranks)
    traffic.collective("all_gather", output.nbytes, ranks, gloo=_pairwise(given, group))
    if ranks > 1 and not _pairwise(given, group):
        return Pending([_work(dist.all_gather_into_tensor(output, given, group=group, async_op=True))])
    rank = dist.get_rank(group)
    parts = output.view(ranks, -1)
    if parts[rank].data_ptr() != given.data_ptr():
        parts[rank].copy_(given.view(-1))
    return Pending(_exchange([given] * ranks, list(parts), rank, group))


def start_all_to_all(received: Tensor, given: Tensor, group: dist.ProcessGroup | None = None) -> Pending:
    """Row i of ``received`` (ranks, k) becomes rank i's row of ``given`` (ranks, k) that is this rank's.

    Raises ValueError when the sizes do not fit.
    """
    ranks = dist.get_world_size(group)
    _require_fit(part=given[0], whole=received, ranks=ranks)
    traffic.collective("all_to_all", given.nbytes, ranks, gloo=_pairwise(given, group))
    if ranks > 1 and not _pairwise(given, group):
        return Pending([_work(dist.all_to_all_single(received, given, group=group, async_op=True))])
    rank = dist.get_rank(group)
    received[rank].copy_(given[rank])
    return Pending(_exchange(list(given), list(received), rank, group))


def start_all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Pending:
    """``tensor`` becomes the sum of all ranks' ``tensor``."""
    traffic.collective("all_reduce", tensor.nbytes, dist.get_world_size(group), gloo=_pairwise(tensor, group))
    return Pending([_work(dist.all_reduce(tensor, group=group, async_op=True))])


def start_trade(
    sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]], group: dist.ProcessGroup | None = None
) -> Pending:
    """Messages between some of the ranks: each tensor with whom it goes to, or comes from.

    Tensors are one-dimensional and contiguous; empty ones are left out, on both sides.
    """
    on_gloo = sum(_pairwise(one, group) for one, _ in sent if one.numel())
    traffic.message(sum(one.nbytes for one, _ in sent), gloo=on_gloo)
    operations = [dist.P2POp(dist.isend, one, group=group, group_peer=to) for one, to in sent if one.numel()]
    operations += [dist.P2POp(dist.irecv, one, group=group, group_peer=of) for one, of in received if one.numel()]
    return Pending(dist.batch_isend_irecv(operations) if operations else [])


def reduce_scatter(output: Tensor, given: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """``start_reduce_scatter``, and wait."""
    start_reduce_scatter(output, given, group).wait()


def all_gather(output: Tensor, given: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """``start_all_gather``, and wait."""
    start_all_gather(output, given, group).wait()


def _pairwise(tensor: Tensor, group: dist.ProcessGroup | None) -> bool:
    return tensor.device.type == "cpu" and "gloo" in dist.get_backend(group)


def _exchange(
    sent: list[Tensor], received: list[Tensor], rank: int, group: dist.ProcessGroup | None
) -> list[dist.Work]:
    ranks = len(sent)
    operations: list[dist.P2POp] = []
    for distance in range(1, ranks):  # each rank starts with another neighbour, so none is everyone's first target
        to, origin = (rank + distance) % ranks, (rank - distance) % ranks
        operations.append(dist.P2POp(dist.isend, sent[to].view(-1), group=group, group_peer=to))
        operations.append(dist.P2POp(dist.irecv, received[origin], group=group, group_peer=origin))
    return dist.batch_isend_irecv(operations) if operations else []


def _work(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise RuntimeError("this process is not in the group of the collective")
    return work


def _require_fit(*, part: Tensor, whole: Tensor, ranks: int) -> None:
    # gloo ends the process, with no exception, on a message of another length than expected
    if part.numel() * ranks != whole.numel() or part.dtype != whole.dtype:
        raise ValueError(
            f"{ranks} parts of {part.numel()} {part.dtype} elements do not make {whole.numel()} of {whole.dtype}: "
            "pad the whole to a multiple of the ranks, and use one dtype"
        )
    if not (part.is_contiguous() and whole.is_contiguous()):
        raise ValueError("a strided tensor cannot be sent in place: call contiguous() first")
