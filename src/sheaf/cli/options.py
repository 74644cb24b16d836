"""Arguments and options that several verbs share, and how plan text is read."""

from pathlib import Path

import click

from sheaf.errors import PlanError, nearest
from sheaf.plans import Plan

AUTO = "auto"
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130  # exit codes

file_argument = click.argument("file", metavar="FILE.py[:NAME]")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object; progress goes to stderr.")
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="How many workers (default: as this machine has)."
)


def read_plan(text: str) -> Plan:
    """A plan from text such as ``dp=2,zero=1``, or from a ``.toml`` file.

    Raises PlanError listing everything wrong with it, and when there is no such file.
    """
    if not text.endswith(".toml"):
        return Plan.parse(text)
    path = Path(text)
    try:
        return Plan.from_toml(path.read_text(encoding="utf-8"))
    except PlanError as error:
        raise PlanError([f"{text}: {rule}" for rule in error.broken]) from None
    except (OSError, UnicodeDecodeError) as error:
        others = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        hint = f"; {nearest(text, others)}" if others else "; `sheaf train` writes plan.toml into a run's directory"
        raise PlanError(f"the plan file {text} cannot be read: {error}{hint}") from None
