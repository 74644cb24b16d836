"""A loss is a sum and a weight, so that any split of a batch adds up to what one machine computes."""

from dataclasses import dataclass

from torch import Tensor

from sheaf.errors import TaskError


@dataclass(frozen=True)
class Loss:
    """``sum`` over a microbatch, and ``weight``: how many tokens, pixels or samples the mean is over.

    The loss of a step is the sum of all sums over the sum of all weights of the global batch, so padding, ragged
    batches and unequal workers give the gradient one machine would have computed.
    """

    sum: Tensor  # a scalar with a gradient
    weight: Tensor | float | int  # a scalar; its gradient, if any, is not used


def as_loss(value: object, samples: int) -> Loss:
    """What a loss function returned, as a Loss; a plain scalar is a mean weighted by ``samples``.

    Raises TaskError when it is neither.
    """
    if isinstance(value, Loss):
        if value.sum.numel() != 1:
            raise TaskError(f"Loss.sum has shape {tuple(value.sum.shape)}; it must be one number: add it up")
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return Loss(value.reshape(()) * samples, float(samples))
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TaskError(f"the loss function returned {found}; return sheaf.Loss(sum, weight) or a scalar mean")
