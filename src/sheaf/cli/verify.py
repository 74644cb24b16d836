"""``sheaf verify``: whether a plan computes what one process computes."""

import click

from sheaf.cli.answer import Answer
from sheaf.cli.options import FAILED, file_argument, json_option, read_plan


@click.command(short_help="Prove that a plan computes what one process does.")
@file_argument
@click.option("--plan", "plan_text", required=True, metavar="TEXT|P.toml", help="The plan to try, such as dp=2,zero=1.")
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
              help="Steps to compare.")  # fmt: skip
@click.option("--no-predict", is_flag=True, help="Do not measure what blocks take to balance stages by that.")
@json_option
@click.pass_context
def verify(context: click.Context, file: str, plan_text: str, steps: int, no_predict: bool, as_json: bool) -> None:
    """Train the same steps in one process and under a plan, and compare losses, gradients and weights.

    Stages that the plan does not name are balanced as `sheaf train` balances them, and the verdict names them.
    Exit code 0: identical, or apart by no more than rounding; 1: wrong, and the first module that departs is named, or
    relaxed, of a plan that is not meant to give the same.
    """
    with Answer(as_json=as_json) as answer:
        from sheaf.api.saying import say
        from sheaf.api.verify import verify as run
        from sheaf.cli.files import load

        plan = read_plan(plan_text)
        verdict = run(load(file), plan, steps=steps, predict=not no_predict, note=say)
        answer.give(verdict.to_dict(), lambda console: console.print(str(verdict), markup=False, soft_wrap=True))
    context.exit(0 if verdict.exact else FAILED)
