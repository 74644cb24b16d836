"""How torch's functions work on slices; importing this room gives every rule to the registry."""

from sheaf.split.rules import (
    about as about,
    attention as attention,
    convolution as convolution,
    elementwise as elementwise,
    loss as loss,
    normalisation as normalisation,
    products as products,
    recurrent as recurrent,
    reductions as reductions,
    shapes as shapes,
    windows as windows,
)
