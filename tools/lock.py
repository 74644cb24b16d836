"""Writes `requirements.lock` from what is installed in the environment that runs it.

Left out: sheaf itself, and what only one build of torch brings along (its CUDA libraries and triton), so that the same
lock serves machines with and without a GPU; pip takes those from what torch's own metadata pins.
"""

import re
from importlib.metadata import distributions
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
HEAD = """\
# Every version that Sheaf is developed and tested with. Written by `make lock`; `make setup` installs it.
# No hashes and no local labels: torch comes in builds for CPUs and for CUDA, and this lock serves both.
# setuptools is the build backend: the editable install is made without build isolation, from this very version.
"""
OF_ONE_TORCH_BUILD = re.compile(r"nvidia[-_].*|cuda[-_].*|triton|pytorch[-_]triton.*|sheaf")


def pinned() -> list[str]:
    """One `name==version` for each distribution, in alphabetical order."""
    versions = {found.name.lower().replace("_", "-"): found.version.partition("+")[0] for found in distributions()}
    return [f"{name}=={versions[name]}" for name in sorted(versions) if not OF_ONE_TORCH_BUILD.fullmatch(name)]


if __name__ == "__main__":
    LOCK.write_text(HEAD + "\n".join(pinned()) + "\n")
