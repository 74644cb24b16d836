"""Writes `docs/map.md`: every module of Sheaf with the first line of its docstring, room by room.

`python tools/map.py` writes the page; with `--check` it only says whether the page is what it would write.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "src" / "sheaf"
PAGE = PROJECT / "docs" / "map.md"
HEAD = """# Map of Sheaf

Written by `make docs` from the first line of each module's docstring. `architecture.md` says why the rooms are these.
"""


def first_line(module: Path) -> str:
    """What a module says it is for; empty where it says nothing."""
    return (ast.get_docstring(ast.parse(module.read_text())) or "").partition("\n")[0].strip()


def drawn(package: Path) -> str:
    """The whole page for one package."""
    rooms: dict[Path, list[Path]] = defaultdict(list)
    for module in sorted(package.rglob("*.py")):
        rooms[module.parent].append(module)
    page = [HEAD]
    for room in sorted(rooms):
        name = ".".join(room.relative_to(package.parent).parts)
        page.append(f"## `{name}`\n")
        opening = room / "__init__.py"
        if opening in rooms[room] and (told := first_line(opening)):
            page.append(f"{told}\n")
        if entries := [module for module in rooms[room] if module != opening]:
            page.append("| module | what it is for |\n|---|---|")
            page.extend(f"| `{module.stem}` | {first_line(module).replace('|', chr(92) + '|')} |" for module in entries)
            page.append("")
    return "\n".join(page).rstrip() + "\n"


def main(arguments: list[str]) -> int:
    """Write the page or, with `--check`, compare it; the exit code."""
    page = drawn(PACKAGE)
    if arguments == ["--check"]:
        if not PAGE.exists() or PAGE.read_text() != page:
            print(f"{PAGE.relative_to(PROJECT)} is not what the modules say now: run `make docs`", file=sys.stderr)
            return 1
        return 0
    if arguments:
        print(f"unknown: {' '.join(arguments)}; use no argument, or --check", file=sys.stderr)
        return 2
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
