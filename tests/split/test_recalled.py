"""What operators give on fake tensors, recalled: as torch says it, wherever it is said."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from sheaf.split.recalled import Known, Recalled


def work(rows: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Products, views, norms, several results, an empty slice and a change in place, and gradients of them."""
    made = F.linear(rows, weight, bias)
    heads = made.unflatten(-1, (2, 4)).transpose(-3, -2)
    whole = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    normed = F.layer_norm(whole, (4,)).masked_fill(whole > 0, 1.0)
    first, second = normed.to(torch.bfloat16).chunk(2, -1)
    joined = torch.cat([first, second.narrow(-1, 0, 0), second * 2], -1).float()
    changed = joined.clone().add_(1)
    changed.sum().backward()
    assert weight.grad is not None
    found = [made, heads, whole, normed, first, second, joined, changed, weight.grad, heads.flatten(-2), heads[0]]
    weight.grad = None
    return found


def look(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, tensor.requires_grad


def given(mode: FakeTensorMode) -> tuple[Tensor, Tensor, Tensor]:
    with mode:
        weight, bias = torch.empty(8, 6, requires_grad=True), torch.empty(8, requires_grad=True)
        return torch.empty(3, 5, 6), weight, bias


def test_what_is_recalled_looks_as_torch_has_it() -> None:
    mode, known = FakeTensorMode(), Known()
    arguments = given(mode)
    with mode:
        plain = [look(one) for one in work(*arguments)]
        with Recalled(mode, known):
            learnt = [look(one) for one in work(*arguments)]
            size = len(known)
            recalled = work(*arguments)
    assert plain == learnt == [look(one) for one in recalled]
    assert size == len(known)
    assert size > 20
    made, heads = recalled[:2]
    assert made.untyped_storage()._cdata == heads.untyped_storage()._cdata  # a view is one


def test_other_types_numbers_and_strides_are_told_apart() -> None:
    mode = FakeTensorMode()
    with mode, Recalled(mode, Known()):
        whole = torch.empty(4, 6, dtype=torch.int64)
        assert [(whole * number).dtype for number in (2, 2.0, True)] == [torch.int64, torch.float32, torch.int64]
        assert [one.clone().stride() for one in (whole, whole.t().contiguous().t())] == [(6, 1), (1, 4)]
        assert [whole.sum(dim).shape for dim in (0, 1)] == [(6,), (4,)]


def test_what_depends_on_values_is_not_recalled() -> None:
    mode, known = FakeTensorMode(), Known()
    with mode, Recalled(mode, known):
        for _ in range(2):
            with pytest.raises(DataDependentOutputException):
                torch.empty(3).sum().item()
            assert torch.tensor(3).item() == 3  # a constant, whose value fake tensors know
            assert (torch.tensor(3) + 1).item() == 4
    assert len(known) == 1
