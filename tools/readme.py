"""Puts the measured numbers of `bench/results/` into README.md and pages of docs, between their markers.

`python tools/readme.py` writes them; with `--check` it only says whether the pages hold what was measured last.
A section lies between `<!-- numbers: executors -->` and `<!-- end -->`; what stands there is replaced. One that begins
with `<!-- numbers: executors goals -->` has no tables.
"""

import re
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from bench import published_report, report  # noqa: E402 - the project's own folder must be on the path first

_DOCS = ("planning.md", "exactness.md", "servers.md", "relaxed.md", "sparse.md")
PAGES = (PROJECT / "README.md", *(PROJECT / "docs" / name for name in _DOCS))
SECTION = re.compile(
    r"(?P<open><!-- numbers: (?P<name>\w+)(?P<brief> goals)? -->\n).*?(?P<close><!-- end -->)", re.DOTALL
)


def filled(page: str, folder: Path = report.RESULTS) -> str:
    """The page with every section as it should be. Raises ValueError for a section that no benchmark fills."""

    def section(found: re.Match[str]) -> str:
        if found["name"] == "published":
            return f"{found['open']}{published_report.section(folder)}\n{found['close']}"
        if found["name"] not in report.NAMES:
            raise ValueError(f"{found['name']!r} is no benchmark; there are {', '.join(report.NAMES)}, published")
        return f"{found['open']}{report.section(found['name'], folder, tables=not found['brief'])}\n{found['close']}"

    return SECTION.sub(section, page)


def main(arguments: list[str]) -> int:
    """Write the sections or, with `--check`, compare them; the exit code."""
    if arguments not in ([], ["--check"]):
        print(f"unknown: {' '.join(arguments)}; use no argument, or --check", file=sys.stderr)
        return 2
    wrong = 0
    for page in PAGES:
        before = page.read_text()
        after = filled(before)
        if arguments and before != after:
            print(f"{page.name} does not hold the numbers in bench/results: run `make docs`", file=sys.stderr)
            wrong = 1
        if not arguments:
            page.write_text(after)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
