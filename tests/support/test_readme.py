"""What the README and the documentation pages show runs, as it stands."""

import csv
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sparseflash

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples():
    """Every ```python block of every page, as a pytest parameter named by page and line."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start()) + 2
            name = f"{page.relative_to(REPO)}:{line}"
            # Padding with empty lines makes a traceback name the line of the page.
            yield pytest.param("\n" * (line - 1) + block[1], name, id=name)


def test_the_readme_has_examples():
    assert len(BLOCK.findall((REPO / "README.md").read_text(encoding="utf-8"))) >= 3


@pytest.mark.parametrize(("source", "name"), list(examples()))
def test_example_runs(source, name, tmp_path, monkeypatch):
    """In a folder and a namespace of its own, with warnings as errors."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(source, name, "exec"), {"__name__": "__main__"})


def test_the_table_of_methods_is_the_registry():
    section = (REPO / "README.md").read_text(encoding="utf-8").split("## Methods")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(sparseflash.methods.names())


def test_relative_links_of_the_pages_lead_somewhere():
    link = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
    for page in PAGES:
        for target in link.findall(page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (
                f"{page.relative_to(REPO)} links to {target}, which is not there"
            )


@pytest.mark.slow
def test_the_site_builds_and_no_link_is_broken(tmp_path):
    """Strict: a page that is missing, a link or an anchor that leads nowhere ends it."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    pages = {path.stem for path in (tmp_path / "site" / "api" / "methods").glob("*.html")}
    assert pages == set(sparseflash.methods.names())


def test_pages_that_name_triton_say_that_no_card_has_run_it_until_one_has():
    said = re.compile(r"[Uu]nverified|(has|have) not run on a\s+card|not yet on a card")
    files = (REPO / "benchmarks" / "results").glob("gpu-*.csv")
    rows = [row for path in files for row in csv.DictReader(path.read_text().splitlines())]
    measured = [
        row for row in rows if row.get("gpu", "interpreter") != "interpreter" and not row.get("error")
    ]
    pages = [*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")]
    named = {path.name: path.read_text() for path in pages if "log" not in path.stem.lower()}
    named = {name: text for name, text in named.items() if re.search("Triton|CUDA|`triton`", text)}
    assert measured or {"README.md", "benchmarks.md"} <= named.keys()
    assert measured or [name for name, text in named.items() if not said.search(text)] == []
