"""Builds the site: the pages of docs/, those that lie outside, and a reference of the public names.

    python docs/build.py          # or: make docs

The pages are gathered in build/pages, their links turned to where they lie in the site; Sphinx then makes
build/site of them. A link that leads nowhere is an error.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main

ROOT = Path(__file__).resolve().parent.parent
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
OUTSIDE = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/gpu.md": "gpu.md",
    "activemark_fast/assets/PHOTOGRAPHS.md": "photographs.md",
}
"""Pages that lie outside docs/, and their names in the site."""
SECTIONS = {
    "Guides": ["owners", "experts"],
    "Attacks and limits": ["security", "frontier", "forgery", "descent", "tracing"],
    "Models": ["models", "forms", "giants"],
    "Measured": [],
    "Inside": ["architecture", "formats", "api", "contributing", "benchmarks", "photographs", "changelog"],
}
"""The contents, by heading; under "Measured" stands every other page of docs/."""


def gather() -> None:
    """Writes all pages into build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("build.py", "__pycache__"))
    for path in PAGES.glob("*.md"):
        path.write_text(linked(path.read_text(), Path("docs")))
    for path, name in OUTSIDE.items():
        (PAGES / name).write_text(linked((ROOT / path).read_text(), Path(path).parent))
    (PAGES / "api.md").write_text(reference())
    named = {page for section in SECTIONS.values() for page in section} | {"index"}
    measured = sorted(path.stem for path in PAGES.glob("*.md") if path.stem not in named)
    with (PAGES / "index.md").open("a") as index:
        for heading, pages in SECTIONS.items():
            names = "\n".join(pages or measured)
            index.write(f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{names}\n```\n")


def linked(markdown: str, folder: Path) -> str:
    """A page's text with the links as the site has them.

    folder: where the page lies, from the repository's root.
    """

    def moved(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        target = (ROOT / folder / path).resolve().relative_to(ROOT)
        inside = target.relative_to("docs") if target.is_relative_to("docs") else None
        name = OUTSIDE.get(target.as_posix()) if inside is None else inside.as_posix()
        if name is None:
            raise ValueError(f"{folder}: a link to {target}, which is no page of the site")
        return f"]({name}{mark}{anchor})"

    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", moved, markdown)


def reference() -> str:
    """The page of the public names, each from its docstring."""
    init = ast.parse((ROOT / "activemark_fast" / "__init__.py").read_text())
    parts = []
    for node in ast.walk(init):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("activemark_fast."):
            for alias in node.names:
                kind = "class" if alias.name[0].isupper() else "function"
                options = ":members:\n" if kind == "class" else ""
                parts.append(f".. auto{kind}:: {node.module}.{alias.name}\n   {options}")
    body = "\n".join(sorted(parts, key=lambda part: part.partition("fast.")[2]))
    return f"# API\n\n```{{eval-rst}}\n{body}\n```\n"


if __name__ == "__main__":
    gather()
    settings = {
        "project": "activemark_fast",
        "extensions": "myst_parser,sphinx.ext.autodoc,sphinx.ext.napoleon",
        "html_theme": "furo",
        "autodoc_typehints": "signature",
        "myst_heading_anchors": "3",
        "suppress_warnings": "misc.highlighting_failure",
    }
    defines = [part for name, value in settings.items() for part in ("-D", f"{name}={value}")]
    sys.exit(main(["-C", "-W", "--keep-going", "-q", "-E", *defines, str(PAGES), str(SITE)]))
