"""Run the tutorials, which are notebooks, and keep what they print.

python docs/make_tutorials.py [NAME ...]

Cells run one after the other in one namespace, as a kernel would run them; no Jupyter is needed. `text` is a
notebook as Markdown, which the site shows.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from sparseflash.common.files import write

FOLDER = Path(__file__).parent / "tutorials"


def notebooks() -> list[Path]:
    """All of them, in the order of reading."""
    return sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    """A notebook."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run(notebook: dict[str, Any]) -> list[str]:
    """What each code cell prints, the value of its last expression included."""
    space: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"]))
        last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(body, "cell", "exec"), space)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), "cell", "eval"), space)
                if value is not None:
                    print(repr(value))
        printed.append(said.getvalue())
    return printed


def kept(notebook: dict[str, Any]) -> list[str]:
    """What each code cell printed when the notebook was made."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join("".join(part["text"]) for part in cell["outputs"]) for cell in cells]


def made(notebook: dict[str, Any], printed: list[str]) -> str:
    """The file of a notebook whose cells print this."""
    outputs, n = iter(printed), 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            n += 1
            said = next(outputs)
            stream = {"name": "stdout", "output_type": "stream", "text": said.splitlines(keepends=True)}
            cell |= {"execution_count": n, "outputs": [stream] if said else []}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def text(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown."""
    parts = []
    outputs = iter(kept(notebook))
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        if said := next(outputs).rstrip():
            parts.append(f"```text\n{said}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    for path in notebooks():
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            notebook = read(path)
            write(path, made(notebook, run(notebook)))
            print(path)
