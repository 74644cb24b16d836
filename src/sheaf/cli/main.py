"""The entry: finds the verb, and turns errors into messages and exit codes."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from sheaf.cli.answer import leads, rank
from sheaf.cli.options import BAD_INPUT, FAILED, INTERRUPTED
from sheaf.errors import ClusterError, DataError, NonFiniteLoss, PlanError, RunError, SheafError, TaskError, nearest

VERBS = ("plan", "train", "verify", "measure", "known", "bench")
_BAD_INPUT = (TaskError, DataError, PlanError, ClusterError, RunError)


class _Verbs(click.Group):
    """The verbs, each loaded when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        return getattr(importlib.import_module(f"sheaf.cli.{cmd_name}"), cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"{args[0]!r} is not a verb; {nearest(args[0], VERBS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Verbs,
    subcommand_metavar="VERB ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="sheaf")
def sheaf() -> None:
    """Split any PyTorch model's training over any machines, and prove that the answer did not change.

    FILE.py holds a sheaf.Task, or a function that returns one, called `task`; FILE.py:NAME takes another.

    Exit codes: 0 done, 1 a run failed or `verify` found another answer, 2 bad input, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code.

    0: done, and `verify` found the plan right; 1: a run failed, or `verify` found the plan wrong; 2: bad input;
    130: interrupted.
    """
    code = _run(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output went away; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if code not in (0, INTERRUPTED) and _among_workers():
        sys.stderr.flush()
        os._exit(code)  # what is under way between workers would be waited for, and the others may never come
    sys.exit(code)


def _among_workers() -> bool:
    torch = sys.modules.get("torch.distributed")
    return torch is not None and torch.is_available() and torch.is_initialized()


def _run(arguments: Sequence[str] | None) -> int:
    try:
        result: Any = sheaf.main(args=arguments, prog_name="sheaf", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        if leads():
            error.show()
        return BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except SheafError as error:
        bad_input = isinstance(error, _BAD_INPUT)
        # Every worker finds the same fault in what it was given; a fault of its own only that worker can tell.
        if leads() or not (bad_input or isinstance(error, NonFiniteLoss)):
            who = "sheaf" if leads() else f"sheaf: worker {rank()}"
            click.echo(f"{who}: {error}", err=True)
        return BAD_INPUT if bad_input else FAILED
    except BrokenPipeError:
        return FAILED
