"""How right the planner is on this machine: predicted beside measured step time, and what its first choice costs."""

import statistics
import sys
from pathlib import Path
from typing import Any

from sheaf import Plan, Task, launch
from sheaf.api.plan import plan as rank
from sheaf.cli.files import load

EXAMPLES = ("gpt_text", "digits_resnet")
PLANS = (
    "serial",
    "dp=2",
    "dp=2,shares=stolen",
    "dp=2,zero=1",
    "dp=2,zero=2",
    "dp=2,zero=3",
    "dp=2,recompute=full",
    "dp=4",
)


def step_seconds(given: Task, text: str, steps: int) -> list[float]:
    """Seconds of each step on this worker, without the first two."""
    from sheaf.parallel import build

    step = build(given, Plan.parse(text))
    return [step().seconds for _ in range(steps + 2)][2:]


def measured_seconds(task: Task, text: str, steps: int) -> list[float]:
    """The same for the plan's workers in processes of their own; worker 0's clock."""
    return launch.run(step_seconds, Plan.parse(text).workers, task, text, steps)[0]


def compare(name: str, *, rounds: int, steps: int) -> dict[str, Any]:
    """Predict first, from a profile taken now; then measure every plan, in turn, several rounds."""
    task = load(f"examples/{name}.py")
    ranking = rank(task, workers=4, fresh=True)
    predicted = {str(entry.plan): entry.price.step_seconds for entry in ranking.ranked}
    measured: dict[str, list[float]] = {text: [] for text in PLANS if text in predicted}
    for _ in range(rounds):
        for text, seconds in measured.items():
            seconds += measured_seconds(task, text, steps)
    rows = [
        {
            "plan": text,
            "predicted_seconds": predicted[text],
            "measured_seconds": statistics.median(seconds),
            "error": predicted[text] / statistics.median(seconds) - 1,
        }
        for text, seconds in measured.items()
    ]
    fastest = min(rows, key=lambda row: row["measured_seconds"])
    chosen = min(rows, key=lambda row: row["predicted_seconds"])
    return {
        "task": name,
        "rows": rows,
        "median_error": statistics.median(abs(row["error"]) for row in rows),
        "first_choice": chosen["plan"],
        "fastest": fastest["plan"],
        "regret": chosen["measured_seconds"] / fastest["measured_seconds"] - 1,
    }


def run(*, rounds: int = 2, steps: int = 12) -> list[dict[str, Any]]:
    """Every example."""
    return [compare(name, rounds=rounds, steps=steps) for name in EXAMPLES]


if __name__ == "__main__":
    for example in sys.argv[1:] or EXAMPLES:
        found = compare(Path(example).stem, rounds=2, steps=10)
        for row in found.pop("rows"):
            print(f"{row['plan']:32} {row['predicted_seconds']:.4f} {row['measured_seconds']:.4f} {row['error']:+.0%}")
        print(found, flush=True)
