"""A file of weights to start from, read one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from sheaf.errors import TaskError


class WeightsFile:
    """A safetensors file that holds every parameter of a model, and maybe buffers.

    ``names`` maps canonical parameter names to their aliases; ``tensors`` holds the model's parameters and buffers.
    Raises TaskError when the file cannot be read, and listing everything that does not fit.
    """

    def __init__(self, path: Path, names: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor]) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except Exception as error:
            raise TaskError(f"weights={str(path)!r} is not a safetensors file: {error}") from error
        held = set(self._file.keys())
        buffers = [name for name in tensors if name not in names]
        self._key = {
            name: next((alias for alias in (name, *aliases) if alias in held), None) for name, aliases in names.items()
        } | {name: name if name in held else None for name in buffers}
        broken = [f"weights hold no {name}, a parameter of the model" for name in names if not self._key[name]]
        used = {*buffers, *names, *(alias for rest in names.values() for alias in rest)}
        broken += [f"weights hold {name}, which the model does not have" for name in sorted(held - used)]
        for name, tensor in tensors.items():
            key = self._key[name]
            if key and tuple(self._file.get_slice(key).get_shape()) != tuple(tensor.shape):
                found = tuple(self._file.get_slice(key).get_shape())
                broken.append(f"weights hold {name} with shape {found}; the model wants {tuple(tensor.shape)}")
        if broken:
            raise TaskError(broken)

    def __contains__(self, name: str) -> bool:
        return self._key.get(name) is not None

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return self._file.get_tensor(self._key[name])
