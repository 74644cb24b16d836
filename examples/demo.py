"""The whole road in one go: measure, plan, train over several workers, prove, look. `make demo` runs this."""

import time

import torch
from gpt_text import task as gpt_text

import sheaf
from sheaf.cli.answer import console as make_console
from sheaf.cli.answer import note
from sheaf.cli.plan import show
from sheaf.cli.show import described
from sheaf.units import pretty_seconds

STEPS, VERIFIED_STEPS = 60, 2
MOST_WORKERS = 4
console = make_console()


def tell(number, title):
    console.print(f"\n[bold]{number}. {title}[/bold]\n")


def main():
    began = time.monotonic()
    task = gpt_text()
    console.print("A GPT with 1.3 million parameters learns to write the Python language reference, byte by byte.")

    tell(1, "What do we have? The workers of this machine, and the links between them, measured.")
    workers = min(MOST_WORKERS, max(2, torch.get_num_threads()))
    cluster = sheaf.measure(workers, quick=True)
    console.print("\n".join(described(cluster)), markup=False, soft_wrap=True)

    tell(2, "Which plans are there, and what would a step of each take?")
    ranking = sheaf.plan(task, workers=workers, cluster=cluster, note=note)
    show(ranking, None, console, rows=8)
    chosen = several(ranking)

    tell(3, f"Training {STEPS} steps under {chosen.plan}, on {chosen.plan.workers} workers.")
    run = sheaf.train(task, chosen.price, steps=STEPS, workers=workers, save_every=0)
    console.print(f"\nloss {run.losses[0]:.5g} at the first step, {run.losses[-1]:.5g} at the last")
    console.print(
        f"{pretty_seconds(run.seconds_per_step)} per step; the planner said {pretty_seconds(chosen.price.step_seconds)}"
    )

    tell(
        4, f"Did splitting change the answer? {VERIFIED_STEPS} steps again, in one process of plain PyTorch beside it."
    )
    verdict = sheaf.verify(task, chosen.plan, steps=VERIFIED_STEPS)
    console.print(str(verdict), markup=False, soft_wrap=True)

    tell(5, "Look at it.")
    console.print(f"picture       {run.directory / 'picture.png'}", soft_wrap=True)
    console.print(f"record, plan  {run.directory}", soft_wrap=True)
    console.print(f"\nall of this took {pretty_seconds(time.monotonic() - began)}")
    console.print("next: copy examples/gpt_text.py, put your own model into it, and run `sheaf plan YOURS.py`")
    return 0 if verdict.exact else 1


def several(ranking):
    """The best plan with several workers, and a word about it where one worker would be faster."""
    best = ranking.ranked[0]
    chosen = next((entry for entry in ranking.ranked if entry.plan.workers > 1), best)
    if chosen is best:
        console.print("\nSo that is the plan we run.")
    else:
        console.print(
            f"\nFor this small model on this machine, {best.plan} is the fastest; alone, we would run that. "
            f"To show workers at work we take the best plan with several, {chosen.plan}: {chosen.loses_on}."
        )
    return chosen


if __name__ == "__main__":
    raise SystemExit(main())
