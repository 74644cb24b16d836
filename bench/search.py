"""The search for the best plan of a model with 175 billion parameters, on 1,024 and on 100,000 devices.

What a user would type is run again and again, each time in a process of its own: seconds of the search as the command
tells them, of the whole command (which imports torch, traces the model and rehearses its splits first), and the most
memory that its process held.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDS = 5
EXAMPLE = Path(__file__).parents[1] / "examples" / "gpt_175b.py"
ASKED = (("", "a100-dgx:128"), (":large", "h100-dgx:12500"))  # which task of the example, and for which cluster


def run(count: int = ROUNDS) -> list[dict[str, Any]]:
    """One result for each cluster: medians and quartiles over ``count`` commands, the clusters in turn."""
    found = [[planned(task, cluster) for task, cluster in ASKED] for _ in range(count)]
    return [_result(list(runs)) for runs in zip(*found, strict=True)]


def planned(task: str, cluster: str) -> dict[str, Any]:
    """What one command said and took."""
    command = [sys.executable, "-m", "sheaf", "plan", f"{EXAMPLE}{task}", "--cluster", cluster, "--json"]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out, subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        out.seek(0)
        said = json.load(out)
    return {
        "cluster": cluster,
        "workers": int(cluster.partition(":")[2]) * 8,
        "plan": said["plans"][0]["text"],
        "looked_at": said["looked_at"],
        "search_seconds": said["search_seconds"],
        "command_seconds": seconds,
        "peak_bytes": used.ru_maxrss * 1024,
    }


def _result(runs: list[dict[str, Any]]) -> dict[str, Any]:
    low, median, high = statistics.quantiles((one["search_seconds"] for one in runs), n=4)
    return {
        **runs[0],
        "search_seconds": median,
        "low": low,
        "high": high,
        "command_seconds": statistics.median(one["command_seconds"] for one in runs),
        "peak_bytes": max(one["peak_bytes"] for one in runs),
        "runs": len(runs),
    }
