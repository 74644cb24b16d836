"""What holds for every module and every page of the project."""

import ast
import re
import runpy
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
MODULES = sorted((PROJECT / "src" / "sheaf").rglob("*.py"))
LONGEST = 400  # lines; a longer module holds two ideas, so give the second its own

# A page's snippets that begin with this line are run, in order and in one namespace per page.
SNIPPET = re.compile(r"^```python\n# runnable\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def named(path: Path) -> str:
    return str(path.relative_to(PROJECT))


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_a_module_is_short_and_says_what_it_is_for(module):
    text = module.read_text()
    assert len(text.splitlines()) <= LONGEST
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "give the module a docstring: its first line becomes its entry in docs/map.md"


def test_every_room_has_an_opening():
    rooms = {module.parent for module in MODULES}
    assert [named(room) for room in sorted(rooms) if not (room / "__init__.py").exists()] == []


def pages() -> list[Path]:
    return [page for page in [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))] if page.exists()]


@pytest.mark.parametrize("page", [page for page in pages() if SNIPPET.search(page.read_text())], ids=named)
def test_the_snippets_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    # The snippets are put at their own lines of an otherwise empty file: a traceback points into the page, and what
    # starts workers finds functions that live in a file.
    lines = [""] * len(text.splitlines())
    for snippet in SNIPPET.finditer(text):
        first = text.count("\n", 0, snippet.start("code"))
        code = snippet["code"].splitlines()
        lines[first : first + len(code)] = code
    program = tmp_path / "snippets.py"
    program.write_text("\n".join(lines) + "\n")
    runpy.run_path(str(program), run_name="__main__")


@pytest.mark.parametrize("page", pages(), ids=named)
def test_links_between_pages_lead_somewhere(page):
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_dependency_is_explained_and_locked():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in project["project"]["optional-dependencies"].values():
        wanted.extend(extra)
    names = {re.match(r"[A-Za-z0-9_-]+", line)[0].lower() for line in wanted} - {"sheaf"}
    explained = (PROJECT / "docs" / "dependencies.md").read_text().lower()
    assert [name for name in sorted(names) if f"`{name}`" not in explained] == []
    locked = (PROJECT / "requirements.lock").read_text().lower().replace("_", "-")
    extras = {"pyspark", "ray", "mpi4py"}  # engines: installed by who uses them, so not in the lock
    assert [name for name in sorted(names - extras) if f"\n{name.replace('_', '-')}==" not in locked] == []
