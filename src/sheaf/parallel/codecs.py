"""Numbers as fewer bytes: 16-bit floats, and 8-bit integers with a scale for each chunk."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sheaf.plans.compression import INT8_CHUNK


class AbstractCodec(ABC):
    """Codes rows of numbers. A row's length is a multiple of ``chunk``."""

    chunk: int = 1

    @abstractmethod
    def encode(self, rows: Tensor) -> Tensor:
        """(rows, k) floats as (rows, bytes) of uint8."""

    @abstractmethod
    def decode(self, coded: Tensor, dtype: torch.dtype) -> Tensor:
        """(rows, bytes) of uint8 as (rows, k) floats."""


class Cast(AbstractCodec):
    """As floats of another kind, rounded to the nearest; what is too large becomes the largest there is."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._largest = dtype, torch.finfo(dtype).max

    def encode(self, rows: Tensor) -> Tensor:
        return rows.clamp(-self._largest, self._largest).to(self._dtype).view(torch.uint8)

    def decode(self, coded: Tensor, dtype: torch.dtype) -> Tensor:
        return coded.view(self._dtype).to(dtype)


class Int8(AbstractCodec):
    """As whole numbers from -127 to 127 times a scale, which is each chunk's largest magnitude over 127.

    Blockwise scales as in Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.
    """

    chunk = INT8_CHUNK

    def encode(self, rows: Tensor) -> Tensor:
        chunks = rows.float().unflatten(-1, (-1, self.chunk))
        scales = chunks.abs().amax(-1, keepdim=True) / 127
        whole = (chunks / scales.where(scales > 0, 1)).round().to(torch.int8)
        return torch.cat([whole.flatten(-2).view(torch.uint8), scales.squeeze(-1).view(torch.uint8)], -1)

    def decode(self, coded: Tensor, dtype: torch.dtype) -> Tensor:
        count = coded.shape[-1] // (self.chunk + 4)
        whole, scales = coded.split([count * self.chunk, count * 4], -1)
        chunks = whole.view(torch.int8).unflatten(-1, (count, self.chunk)).to(dtype)
        return (chunks * scales.contiguous().view(torch.float32).to(dtype)[..., None]).flatten(-2)
