"""The same sums in another order: how one process rounds differently without computing anything else."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

AS_IT_IS, FLIPPED, ROLLED = "as it is", "flipped", "rolled"


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """In which order a serial run adds up.

    ``parts``      the step's gradient is added up in so many partial sums, as if by so many workers
    ``late``       the summed gradient is divided by the weight, rather than each microbatch's loss before backward
    ``kernels``    the order in which matrix, convolution and batch reductions run over their terms
    ``threads``    how many threads compute; None leaves the number as it is
    """

    parts: int = 1
    late: bool = False
    kernels: str = AS_IT_IS
    threads: int | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute in this order inside the block."""
        before = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            with nullcontext() if self.kernels == AS_IT_IS else Reordered(_ORDERS[self.kernels]):
                yield
        finally:
            torch.set_num_threads(before)

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """The global L2 norm, added up in ``parts`` pieces of each tensor."""
        pieces = [piece for gradient in gradients for piece in gradient.flatten().chunk(self.parts)]
        return torch.nn.utils.get_total_norm(pieces)


@contextmanager
def steady() -> Iterator[None]:
    """Inside, an accelerator convolves in full precision, and by a kernel that gives the same each time.

    As torch has it otherwise, TF32 and the choice of a kernel by the shapes at hand would tell apart what is the same.
    """
    chosen = torch.backends.cudnn
    with chosen.flags(enabled=chosen.enabled, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def _flip(tensor: Tensor, dim: int) -> Tensor:
    return tensor.flip(dim)


def _roll(tensor: Tensor, dim: int) -> Tensor:
    return tensor.roll((tensor.shape[dim] + 1) // 2, dim)


_ORDERS: dict[str, Callable[[Tensor, int], Tensor]] = {FLIPPED: _flip, ROLLED: _roll}
_aten = torch.ops.aten


class Reordered(TorchDispatchMode):
    """Every product of matrices, convolution and plain sum runs over its terms in another order.

    The terms are the same, so in exact arithmetic the results are too; what departs is rounding, forward and
    backward. (Measuring rounding by perturbing the order of operations: Vignes, CESTAC, 1993.)
    """

    def __init__(self, order: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self._order = order
        self._rules: dict[Any, Callable[..., Any]] = {
            _aten.mm.default: self._mm,
            _aten.bmm.default: self._bmm,
            _aten.addmm.default: self._addmm,
            _aten.baddbmm.default: self._baddbmm,
            _aten.convolution.default: self._convolution,
            _aten.convolution_backward.default: self._convolution_backward,
            _aten.sum.dim_IntList: self._sum,
            _aten.sum.default: self._sum_of_all,
            _aten.mean.default: self._mean_of_all,
            _aten.native_batch_norm.default: self._batch_norm,
            _aten.native_batch_norm_backward.default: self._batch_norm_backward,
            _aten._scaled_dot_product_flash_attention_for_cpu.default: self._attention,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reorder the operations that are known; leave the others."""
        operation: Callable[..., Any] = self._rules.get(func) or func
        return operation(*args, **(kwargs or {}))

    def _mm(self, left: Tensor, right: Tensor) -> Tensor:
        return _aten.mm(self._order(left, 1), self._order(right, 0))

    def _bmm(self, left: Tensor, right: Tensor) -> Tensor:
        return _aten.bmm(self._order(left, 2), self._order(right, 1))

    def _addmm(self, bias: Tensor, left: Tensor, right: Tensor, **scales: Any) -> Tensor:
        return _aten.addmm(bias, self._order(left, 1), self._order(right, 0), **scales)

    def _baddbmm(self, bias: Tensor, left: Tensor, right: Tensor, **scales: Any) -> Tensor:
        return _aten.baddbmm(bias, self._order(left, 2), self._order(right, 1), **scales)

    def _convolution(self, inputs: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if rest[-1] != 1 or rest[-3]:  # groups, transposed: channels are not one plain reduction
            return _aten.convolution(inputs, weight, *rest)
        return _aten.convolution(self._order(inputs, 1), self._order(weight, 1), *rest)

    def _convolution_backward(self, gradient: Tensor, inputs: Tensor, *rest: Any) -> Any:
        # the gradient of the weight adds over samples: take them in another order, and put the inputs' gradient back
        index = self._order(torch.arange(inputs.shape[0], device=inputs.device), 0)
        to_inputs, *others = _aten.convolution_backward(gradient[index], inputs[index], *rest)
        return _restored(to_inputs, index), *others

    def _sum(self, tensor: Tensor, dims: list[int] | None = None, keepdim: bool = False, **options: Any) -> Tensor:
        return _aten.sum.dim_IntList(self._along(tensor, dims or range(tensor.dim())), dims, keepdim, **options)

    def _sum_of_all(self, tensor: Tensor, **options: Any) -> Tensor:
        return _aten.sum.default(self._along(tensor, range(tensor.dim())), **options)

    def _mean_of_all(self, tensor: Tensor, **options: Any) -> Tensor:
        return _aten.mean.default(self._along(tensor, range(tensor.dim())), **options)

    def _along(self, tensor: Tensor, dims: Iterable[int]) -> Tensor:
        for dim in dims if tensor.dim() and not tensor.is_sparse else ():
            tensor = self._order(tensor, dim)
        return tensor

    def _batch_norm(self, inputs: Tensor, *rest: Any) -> Any:
        index = self._order(torch.arange(inputs.shape[0], device=inputs.device), 0)
        output, *statistics = _aten.native_batch_norm(inputs[index], *rest)
        return _restored(output, index), *statistics

    def _batch_norm_backward(self, gradient: Tensor, inputs: Tensor, *rest: Any) -> Any:
        index = self._order(torch.arange(inputs.shape[0], device=inputs.device), 0)
        to_inputs, *others = _aten.native_batch_norm_backward(gradient[index], inputs[index], *rest)
        return _restored(to_inputs, index), *others

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        return _aten._scaled_dot_product_flash_attention_for_cpu(
            self._order(query, 3), self._order(key, 3), value, *rest, **options
        )


def _restored(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[index.argsort()]
