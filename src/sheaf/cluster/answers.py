"""An answer that one worker finds for all, or the error that it met, as bytes to be sent. No pickles travel."""

import json
from collections.abc import Callable
from typing import Any

from sheaf import errors
from sheaf.errors import RunError, SheafError

_ALIKE = (errors.RunError, errors.TaskError, errors.PlanError, errors.DataError)  # made of a message alone


def told(find: Callable[[], Any]) -> tuple[bytes, SheafError | None]:
    """What ``find`` gives, of what JSON knows, or the SheafError that it raises; as bytes for ``heard``, and itself."""
    try:
        return json.dumps({"value": find()}).encode(), None
    except SheafError as raised:
        return json.dumps({"error": type(raised).__name__, "message": str(raised)}).encode(), raised


def heard(content: bytes) -> Any:
    """What was told elsewhere. Raises the error that was."""
    answer: dict[str, Any] = json.loads(content)
    if "error" in answer:
        kind = getattr(errors, answer["error"], RunError)
        raise (kind if kind in _ALIKE else RunError)(answer["message"])
    return answer["value"]
