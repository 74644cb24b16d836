"""The loop over a step: record, watch, save, stop, resume."""

from sheaf.training.checks import affordable, first_sample
from sheaf.training.description import describe, digest
from sheaf.training.directory import check, in_use
from sheaf.training.heirs import goes_on
from sheaf.training.loop import Outcome, train_rank
from sheaf.training.pipeline import measured_rows

__all__ = [
    "Outcome",
    "affordable",
    "check",
    "describe",
    "digest",
    "first_sample",
    "goes_on",
    "in_use",
    "measured_rows",
    "train_rank",
]
