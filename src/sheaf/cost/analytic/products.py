"""What a matrix product costs an accelerator that computes it tile by tile."""

import math
from functools import lru_cache

# Sizes of output tiles that libraries choose from: NVIDIA/cutlass, media/docs/efficient_gemm.md.
TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
PARTS = (1, 2, 4, 8, 16)  # of the inner dimension, computed at once and then added


@lru_cache(maxsize=65536)
def tiled_flops(rows: int, columns: int, inner: int, units: int, edge: float, ramp: float) -> float:
    """FLOP that a product of ``rows x inner`` by ``inner x columns`` takes in time, at the rate of a large one.

    Whole tiles are computed, and as many at once as there are ``units``, so a product that fills its last tiles or its
    last round badly takes as long as a larger one. A tile of a x b does a·b/(a·b + edge·(a + b)) of the rate, as
    its edges are loaded; each of its rounds loses ``ramp`` steps of the inner dimension to starting and ending.
    The best of the tiles counts.

    >>> large = tiled_flops(8192, 8192, 8192, 108, 16.0, 64.0) / (2 * 8192**3)
    >>> small = tiled_flops(256, 1100, 1024, 108, 16.0, 64.0) / (2 * 256 * 1100 * 1024)
    >>> large < 1.1 < 2 < small
    True
    """
    best = math.inf
    share_of_best = _share(*TILES[0], edge)
    for height, width in TILES:
        tiles = math.ceil(rows / height) * math.ceil(columns / width)
        share = _share(height, width, edge) / share_of_best
        for parts in PARTS:
            depth = inner / parts
            if parts > 1 and (depth < 256 or tiles * parts > 4 * units):
                break
            rounds = math.ceil(tiles * parts / max(1, units))
            steps = depth + ramp * (1 if parts == 1 else 2)
            best = min(best, 2.0 * rounds * max(1, units) * height * width * steps / share)
    return best


def _share(height: int, width: int, edge: float) -> float:
    return height * width / (height * width + edge * (height + width))
