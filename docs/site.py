"""What mkdocs adds to the pages of this folder: README as the first one, and the reference from docstrings.

`make docs` builds the site; mkdocs calls the functions here.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import sparseflash as sf
from sparseflash.methods.base import find

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
OPS = (
    "attention", "attention_varlen", "jagged_attention", "decode", "hash_sparse_attention",
    "qk_sparse_attention", "linear_attention", "stick_breaking", "scan", "pointwise_attention",
    "muse_attention", "attention_quantised", "attention_backward", "attention_stats", "recall", "merge",
    "indexer_topk", "indexer_kl_loss", "t5_buckets",
)  # fmt: skip
ROOMS = (
    "selection",
    "cache",
    "selection.calibrate",
    "distributed",
    "compat.flash_attn",
    "compat.flex_attention",
)


def _reference() -> dict[str, str]:
    """Text of each page of the reference, by its path."""
    made = {"api/plan.md": "# Plans\n\n::: sparseflash.Plan\n\n::: sparseflash.Plans\n"}
    made |= {f"api/{name}.md": f"# {name}\n\n::: sparseflash.{name}\n" for name in OPS}
    for name in sf.methods.names():
        kind = find(name)
        made[f"api/methods/{name}.md"] = f"# {name}\n\n::: {kind.__module__}.{kind.__qualname__}\n"
    layers = [x for x in sf.nn.__all__ if isinstance(getattr(sf.nn, x), type)]
    made["api/nn.md"] = "# sf.nn\n\n" + "\n\n".join(f"::: sparseflash.nn.{x}" for x in layers) + "\n"
    made |= {f"api/{room}.md": f"# sf.{room}\n\n::: sparseflash.{room}\n" for room in ROOMS}
    return made


def on_config(config: Any) -> Any:
    """The reference in the table of contents."""
    names = [f"api/{name}.md" for name in ("plan", *OPS)]
    methods = [f"api/methods/{name}.md" for name in sf.methods.names()]
    rooms = ["api/nn.md", *(f"api/{room}.md" for room in ROOMS)]
    config["nav"].insert(3, {"Reference": [{"Plans and ops": names}, {"Methods": methods}, {"Rooms": rooms}]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages that lie elsewhere, the tutorials as text, and the results that pages link to."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for path, text in _reference().items():
        files.append(File.generated(config, path, content=text))
    spec = importlib.util.spec_from_file_location("make_tutorials", ROOT / "docs" / "make_tutorials.py")
    assert spec is not None and spec.loader is not None
    tutorials = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tutorials)
    for path in tutorials.notebooks():
        said = tutorials.text(tutorials.read(path))
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=said))
    for result in sorted((ROOT / "benchmarks" / "results").glob("*.csv")):
        files.append(File.generated(config, f"results/{result.name}", abs_src_path=str(result)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they stand in the repository, to where things lie here."""
    if page.file.src_uri in PAGES.values():
        markdown = re.sub(r"\]\(docs/", "](", markdown)
        markdown = re.sub(r"\]\(benchmarks/results/([\w-]+\.csv)\)", r"](results/\1)", markdown)
    markdown = re.sub(r"\]\(\.\./benchmarks/results/([\w-]+\.csv)\)", r"](results/\1)", markdown)
    for source, target in PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{source}", f"]({target}", markdown)
    markdown = re.sub(r"(tutorials/[\w-]+)\.ipynb\)", r"\1.md)", markdown)
    if page.file.src_uri.startswith("tutorials/"):
        return markdown
    # what is no page is named, and not linked
    return re.sub(
        r"\[([^\]]+)\]\((?!\w+:|#)(?:\.\./[^)]*|[\w./-]*(?:/|\.(?:py|cff|cpp|h)))\)", r"\1", markdown
    )
