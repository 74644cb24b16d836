"""What was measured on slow networks: time to a loss by how gradients meet, and tables of words that travel as rows."""

from collections.abc import Sequence
from typing import Any

from bench.tables import RATIO, Goal, Table, ratio_cells, skipped
from sheaf.units import pretty_bytes

NEAR = 0.05  # bytes sent, against predicted ones
TRANSLATION, SLOWEST = 5.0, "100mbit"  # times the throughput of DDP, on the slowest links


def slow_table(results: Sequence[dict[str, Any]]) -> Table:
    """Each mode: seconds and steps to the held-out loss, and what a worker sends in a step."""
    if any("skipped" in one for one in results):
        return skipped(results)
    peer = results[0]["seconds"]
    rows = [
        (
            f"`{one['mode']}`" if one["predicted_bytes"] is not None else one["mode"],
            f"{one['seconds']:.0f} s" if one["seconds"] else f"not in {one['trained_seconds']:.0f} s",
            f"{peer / one['seconds']:.2f}" if one["seconds"] and peer else "",
            str(one["steps"] or one["trained_steps"]),
            f"{one['step_seconds']:.2f} s",
            f"{one['best_loss']:.3f}",
            pretty_bytes(one["sent_bytes"]),
            f"{_error(one):+.1%}" if one["predicted_bytes"] is not None else "",
        )
        for one in results
    ]
    times = ("to the loss", "times the peer", "steps", "per step")
    return Table(("mode", *times, "lowest loss", "sends per step", "prediction off by"), rows)


def slow_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """Bytes as predicted, and what is as fast as the peer."""
    if any("skipped" in one for one in results):
        return []
    peer, *modes = results
    off = [one for one in modes if abs(_error(one)) > NEAR]
    worst = max(modes, key=lambda one: abs(_error(one)))
    where = f"{peer['hosts']} hosts at {peer['rate']}, held-out loss {peer['target']:g} at learning rate"
    where += f" {peer['learning_rate']:g}"
    reached = [one for one in modes if one["seconds"]]
    goals = [
        Goal(
            f"what a worker sends in a step within {NEAR:.0%} of the prediction, for each mode",
            f"for {len(modes) - len(off)} of {len(modes)}; `{worst['mode']}` is {_error(worst):+.1%} off",
            not off,
        )
    ]
    if reached:
        best = min(reached, key=lambda one: one["seconds"])
        gain = f"{peer['seconds']:.0f} s" if peer["seconds"] else f"not in {peer['trained_seconds']:.0f} s"
        goals.append(
            Goal(
                f"{where}: a mode that is there before {peer['mode']}",
                f"`{best['mode']}` after {best['seconds']:.0f} s, the peer {gain}",
                not peer["seconds"] or best["seconds"] < peer["seconds"],
            )
        )
    return goals


def _error(one: dict[str, Any]) -> float:
    """How far the prediction is above what was sent."""
    return one["predicted_bytes"] / one["sent_bytes"] - 1


def translation_table(results: Sequence[dict[str, Any]]) -> Table:
    """Plans for large tables beside DDP: throughput, what a host sends in a step, and how far losses are apart."""
    if any("skipped" in one for one in results):
        return skipped(results)
    rows = [
        (
            one["rate"],
            *ratio_cells(one, 2),
            pretty_bytes(one["sheaf_sent_bytes"]),
            pretty_bytes(one["peer_sent_bytes"]),
            str(one["samples"]),
            f"{one['losses_apart']:.0e}",
        )
        for one in results
    ]
    told = ("Sheaf sends", "peer sends", "samples a host", "losses differ by")
    return Table(("links", "Sheaf", "beside", *RATIO, *told), rows, words=3)


def translation_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """The goal of large tables on the slowest links, and what is sent against what was predicted."""
    slow = [one for one in results if one.get("rate") == SLOWEST]
    goals: list[Goal] = []
    for samples in dict.fromkeys(one["samples"] for one in slow):
        best = max((one for one in slow if one["samples"] == samples), key=lambda one: one["median"])
        goals.append(
            Goal(
                f"tables as rows at least {TRANSLATION:g} times the throughput of {best['peer']} on {best['hosts']} "
                f"hosts with {SLOWEST} links and {samples} samples each, losses equal",
                f"{best['median']:.2f} (`{best['sheaf']}`), losses {best['losses_apart']:.0e} apart",
                best["median"] >= TRANSLATION,
            )
        )
    return goals
