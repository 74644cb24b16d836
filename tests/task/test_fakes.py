"""Fake tensors that hold no memory: Sheaf's know grouped products in any precision, and leave others' alone."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from sheaf.graph.trace import quiet
from sheaf.task.fakes import Fakes


def grouped(mode: FakeTensorMode, *shapes: tuple[int, ...]) -> torch.Tensor:
    with mode:
        left, right = (torch.empty(shape) for shape in shapes)
        return F.grouped_mm(left, right, offs=torch.empty(3, dtype=torch.int32))


def test_grouped_products_are_sheafs_own_in_its_mode_only():
    made = grouped(Fakes(), (6, 5), (3, 5, 7))
    assert (made.shape, made.dtype) == ((6, 7), torch.float32)
    assert made.is_contiguous(), "as the kernel for CPUs lays it out"
    assert grouped(Fakes(), (5, 6), (6, 7)).shape == (3, 5, 7), "each group of rows makes a matrix"
    with quiet(), pytest.raises(RuntimeError, match="BF16"):  # torch's own is of its kernel for accelerators
        grouped(FakeTensorMode(), (6, 5), (3, 5, 7))
