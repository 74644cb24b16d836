"""Files that are whole or absent: written beside their name, flushed to disk, renamed; and how they are found again."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sheaf.errors import RunError

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, if there is one, and a line of text for each damaged one that was skipped."""

    path: Path | None
    skipped: tuple[str, ...] = ()


def checkpoints(directory: Path) -> Path:
    """Where a run directory keeps its checkpoints."""
    return directory / "checkpoints"


def step_path(directory: Path, step: int) -> Path:
    """The checkpoint taken before step ``step`` runs."""
    return checkpoints(directory) / f"step_{step:06d}"


def saved(directory: Path) -> list[Path]:
    """Checkpoints that were finished, the newest first; they may have been damaged since."""
    if not checkpoints(directory).is_dir():
        return []
    found = [path for path in checkpoints(directory).iterdir() if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def latest(directory: Path) -> Found:
    """The newest checkpoint of a run directory whose files all have the size and CRC that its manifest says."""
    skipped: list[str] = []
    for path in saved(directory):
        wrong = damage(path)
        if wrong is None:
            return Found(path, tuple(skipped))
        skipped.append(f"skipped {path}: {wrong}")
    return Found(None, tuple(skipped))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None when it is whole."""
    try:
        manifest = read_manifest(path)
    except RunError as error:
        return str(error)
    for name, wanted in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != wanted["size_bytes"]:
            return f"{name} has {file.stat().st_size} bytes, {wanted['size_bytes']} were written"
        if crc32(file) != wanted["crc32"]:
            return f"{name} has changed since it was written (its CRC differs)"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: step, plan, workers, task digest, files.

    Raises RunError when there is none or it cannot be read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} has no {MANIFEST}: it is no checkpoint, or was not finished") from None
    except (ValueError, OSError) as error:
        raise RunError(f"{path / MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not {"step", "plan", "workers", "files"} <= manifest.keys():
        raise RunError(f"{path / MANIFEST} is not a manifest of Sheaf's")
    return manifest


def write_json(path: Path, values: Any) -> None:
    """Write JSON that is on disk when this returns.

    Raises RunError for values that JSON does not know.
    """
    try:
        text = json.dumps(values, indent=1)
    except TypeError as error:
        raise RunError(
            f"{path.name} takes what JSON knows (numbers, text, lists, dicts) and nothing else: {error}"
        ) from None
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        _flushed(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that is on disk when this returns; every tensor is copied out of its storage."""
    save_file({name: _own(tensor) for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        _flushed(file.fileno())


def write_model(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole weights under their final name at once: a reader sees the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    write_tensors(beside, tensors)
    rename(beside, path)


def rename(source: Path, target: Path) -> None:
    """Give a finished file or directory its final name, on disk when this returns."""
    source.replace(target)
    flush_directory(target.parent)


def flush_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _flushed(descriptor)
    finally:
        os.close(descriptor)


def described(file: Path) -> dict[str, int]:
    """Size and CRC-32 of a file."""
    return {"size_bytes": file.stat().st_size, "crc32": crc32(file)}


def crc32(file: Path) -> int:
    """CRC-32 of a file's bytes, as zlib computes it."""
    crc = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return crc


def prune(directory: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints, and what unfinished saves left behind."""
    for path in saved(directory)[max(1, keep) :]:
        # Renamed first, so that a removal cut short leaves nothing that looks like a checkpoint.
        doomed = path.with_name(path.name + ".tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        path.replace(doomed)
    for leftover in checkpoints(directory).glob("step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _own(tensor: Tensor) -> Tensor:
    whole = tensor.detach().to("cpu").contiguous()
    shares = whole.untyped_storage().nbytes() != whole.numel() * whole.element_size()
    return whole.clone() if shares or whole.data_ptr() == tensor.data_ptr() else whole


def _flushed(descriptor: int) -> None:
    os.fsync(descriptor)
