"""Save and load: one directory per saved step, whole or absent, for the plan it was saved under."""

from sheaf.checkpoint.files import Found, latest, read_manifest, write_model
from sheaf.checkpoint.save import load, save, save_alone
from sheaf.checkpoint.together import barrier, from_first

__all__ = ["Found", "barrier", "from_first", "latest", "load", "read_manifest", "save", "save_alone", "write_model"]
