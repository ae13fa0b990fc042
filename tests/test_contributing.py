"""What the pages say of the repository is so: where things are, how long they are, where links lead."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
MODULES = sorted((ROOT / "activemark_fast").rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
REASON = "Long, for"


def rows() -> list[tuple[str, str, str]]:
    """Question, file and name of each row of CONTRIBUTING's table."""
    return re.findall(r"^\| (.+?\?) \| `(.+?)` \| `(.+?)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)


def test_the_ten_questions_are_there() -> None:
    assert len(rows()) >= 10


@pytest.mark.parametrize(("question", "file", "name"), rows())
def test_things_are_where_newcomers_are_told(question: str, file: str, name: str) -> None:
    defined = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    assert name in defined


def too_long(path: Path) -> Iterator[str]:
    """What of a module is too long and does not say why."""
    text = path.read_text()
    tree = ast.parse(text)
    if len(text.splitlines()) > LONGEST_FILE and REASON not in (ast.get_docstring(tree) or ""):
        yield "the file"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node)
            last = node.body[0].end_lineno if docstring else node.body[0].lineno - 1
            assert node.end_lineno is not None
            assert last is not None
            if node.end_lineno - last > LONGEST_FUNCTION and REASON not in (docstring or ""):
                yield node.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_long_says_why(path: Path) -> None:
    assert not list(too_long(path))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?:", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(re.findall(r"\d+(?:[.,]\d+)*", text)) <= 20
    assert len(text.split()) <= 700


def test_every_benchmark_is_listed() -> None:
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    assert not [p.name for p in (ROOT / "benchmarks").glob("*.py") if p.name not in listed]


def test_pre_commit_runs_what_make_lint_runs() -> None:
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    commands = [line.strip().removeprefix("$(BIN)/") for line in lint.splitlines()[1:]]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"entry: \.venv/bin/(.+)", hooks)
    assert len(entries) == len(commands)
    for entry, command in zip(entries, commands, strict=True):
        assert command.startswith(entry)
    assert "files: ^(csrc|tests/ops/cuda_on_cpu)/" in hooks
    assert "csrc/* $(shell find tests/ops/cuda_on_cpu -type f)" in lint
