"""Draws the house of `docs/architecture.md`: `python tools/house.py` writes `docs/pictures/house.svg`.

A room that is planned and not built yet is drawn with a dashed edge; when it exists, take it out of `PLANNED`.
"""

import sys
from pathlib import Path

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "house.svg"
PLANNED = {"inference", "elastic", "data"}

INK, SOFT, LINE = "#24323f", "#5d6b78", "#aab4bd"
PAPER, WALL = "#ffffff", "#f6f4ef"
RUN, DO, DECIDE, WAIST, FACT, GROUND, GARDEN = (
    "#dfeaf5", "#d9eedd", "#fbe6cd", "#f3d9d6", "#e7e1f3", "#e6e3db", "#edf3e1",
)  # fmt: skip
FONT = "font-family=\"'DejaVu Sans', Verdana, Helvetica, Arial, sans-serif\""


def text(x, y, words, size=13, *, bold=False, colour=INK, anchor="middle", turn=0):
    """Words at a place."""
    weight = ' font-weight="bold"' if bold else ""
    around = f' transform="rotate({turn} {x} {y})"' if turn else ""
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}'
    return f'<text x="{x}" y="{y}" {style}{around}>{words}</text>'


def room(x, y, width, height, name, told, colour):
    """A box with a room's name and what it holds."""
    planned = name in PLANNED
    dash = ' stroke-dasharray="5 4"' if planned else ""
    ink, fill = (SOFT, "none") if planned else (INK, colour)
    lines = [*told[:-1], f"{told[-1]} (not yet)"] if planned else told
    top = y + height / 2 - 8 * (len(lines) - 1) - 1
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{LINE}"{dash}/>',
        text(x + width / 2, top, name, 14, bold=True, colour=ink),
        *(text(x + width / 2, top + 17 + 15 * number, line, 11.5, colour=SOFT) for number, line in enumerate(lines)),
    ]


def wall(x, y, number):
    """A wall's number in a disc."""
    return [
        f'<circle cx="{x}" cy="{y}" r="11" fill="{INK}"/>',
        text(x, y + 4.5, number, 13, bold=True, colour=PAPER),
    ]


def floor(y, words):
    """The name of a floor, left of the house."""
    return [text(160, y, words, 12, colour=SOFT, anchor="end")]


def drawn():
    """The whole picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1120 776" width="1120" height="776" {FONT}>',
        "<title>The house of Sheaf: rooms on floors, and the four walls between them</title>",
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">',
        f'<path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker></defs>',
        f'<rect width="1120" height="776" rx="10" fill="{PAPER}"/>',
        f'<rect x="190" y="150" width="620" height="600" fill="{WALL}" stroke="{LINE}"/>',
        f'<path d="M168 152 L500 28 L832 152 z" fill="{RUN}" stroke="{LINE}"/>',
        text(500, 92, "cli", 15, bold=True),
        text(500, 111, "one verb per file: plan, train, verify, measure, known", 11.5, colour=SOFT),
        *floor(192, "public verbs"),
        *room(205, 162, 590, 48, "api", ["train, fit, plan, verify, measure: each puts rooms together"], RUN),
        *floor(258, "whole runs"),
        *room(205, 222, 110, 72, "training", ["loop, stop,", "resume"], RUN),
        *room(325, 222, 110, 72, "inference", ["predict"], RUN),
        *room(445, 222, 110, 72, "parity", ["serial beside", "planned"], RUN),
        *room(565, 222, 110, 72, "watch", ["progress,", "pictures"], RUN),
        *room(685, 222, 110, 72, "launch", ["local workers,", "torchrun"], RUN),
        *floor(334, "keep going"),
        *room(205, 306, 590, 48, "elastic", ["workers come and go"], RUN),
        text(334, 384, "the doing wing", 12.5, bold=True, colour=SOFT),
        text(666, 384, "the deciding wing", 12.5, bold=True, colour=SOFT),
        *floor(446, "two wings"),
        *room(205, 394, 124, 108, "parallel", ["build(task, plan):", "replicas, ZeRO,", "pipelines, parts"], DO),
        *room(339, 394, 124, 50, "checkpoint", ["save, load"], DO),
        *room(339, 452, 124, 50, "data", ["caches"], DO),
        *room(537, 394, 258, 50, "search", ["every plan worth pricing, ranked"], DECIDE),
        *room(537, 452, 258, 50, "cost", ["step seconds and bytes, term by term"], DECIDE),
        f'<rect x="491" y="372" width="18" height="138" fill="{LINE}"/>',
        *floor(550, "the waist"),
        *room(205, 520, 290, 52, "plans", ["Plan: a readable value; slices, stages, schedules"], WAIST),
        *room(505, 520, 290, 52, "split", ["layers cut among workers (stands on plans)"], WAIST),
        *floor(618, "the facts"),
        *room(205, 586, 290, 54, "graph", ["any nn.Module as blocks with work and bytes"], FACT),
        *room(505, 586, 290, 54, "cluster", ["workers, devices, links"], FACT),
        *floor(690, "the ground"),
        *room(
            205,
            654,
            330,
            80,
            "task",
            ["model, loss, data, order, random streams,", "weights: what is computed"],
            GROUND,
        ),
        *room(545, 654, 120, 80, "record", ["a line of JSON", "per step"], GROUND),
        *room(675, 654, 120, 80, "errors, units", ["messages,", "numbers"], GROUND),
        f'<path d="M30 751 H1096" stroke="{LINE}" stroke-width="2"/>',
    ]
    parts += [  # beside the house
        f'<path d="M56 170 V730" stroke="{INK}" stroke-width="2" marker-end="url(#tip)"/>',
        text(44, 450, "imports go down only; rooms on one floor do not know each other", 12, turn=-90),
        *wall(56, 152, "1"),
        *wall(500, 441, "2"),
        *wall(675, 222, "4"),
        *garden(860, 600),
        *legend(858, 170),
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def garden(x, y):
    """The zoo, beside the house."""
    return [
        f'<rect x="{x - 10}" y="{y - 12}" width="246" height="162" rx="8" fill="{GARDEN}" stroke="{LINE}"/>',
        *wall(x + 10, y + 8, "3"),
        text(x + 30, y + 13, "zoo, in the garden", 13, bold=True, anchor="start"),
        *room(x + 4, y + 28, 218, 46, "zoo.tasks", ["on real data; see only task"], PAPER),
        *room(x + 4, y + 88, 218, 46, "zoo.models", ["plain PyTorch, nothing of the house"], PAPER),
        f'<path d="M{x + 113} {y + 74} V{y + 86}" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>',
    ]


def legend(x, y):
    """What the numbers mean, and which way data flows."""
    told = [
        ("1", ["Down only, no cycles."]),
        ("2", ["Doing never imports deciding:", "a plan written by hand runs", "without any of it."]),
        ("3", ["Models know nothing of the house:", "yours are treated as ours are."]),
        ("4", ["Watching never touches:", "a broken picture cannot", "stop a run."]),
    ]
    parts = [text(x, y, "The four walls", 14, bold=True, anchor="start")]
    y += 28
    for number, lines in told:
        parts += wall(x + 10, y - 4, number)
        for line in lines:
            parts.append(text(x + 30, y, line, 12, anchor="start"))
            y += 17
        y += 11
    y += 16
    parts.append(text(x, y, "The way of the data", 14, bold=True, anchor="start"))
    for line in ("task + cluster → facts → plan", "plan → step → record → people"):
        y += 20
        parts.append(text(x, y, line, 12, anchor="start"))
    return parts


def main(arguments):
    """Write the picture; the exit code."""
    if arguments:
        print(f"unknown: {' '.join(arguments)}; there is nothing to choose", file=sys.stderr)
        return 2
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(drawn())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
