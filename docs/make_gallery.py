"""Make docs/gallery.md and its pictures: python docs/make_gallery.py. Each is one `sparseflash show`."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from sparseflash import methods
from sparseflash.__main__ import app

DOCS = Path(__file__).parent
PICTURES = [
    ("window", "window=48"),
    ("window", "window=48 causal=False ahead=16"),
    ("sink-window", "window=48 sink_tokens=8"),
    ("dilated", "window=16 dilation=5"),
    ("strided", "block=8 local=3 stride=6"),
    ("bigbird", "block=16 global_blocks=1 random_blocks=2"),
    ("bigbird", "block=16 global_blocks=1 random_blocks=2 causal=True"),
    ("prefix-lm", "prefix=80"),
    ("block-causal", "block=32"),
    ("documents", "length=60"),
    ("tree", "branching=2"),
    ("grid-window", "grid=(16,16) window=(4,4)"),
    ("grid-window", "grid=(16,16) window=(4,4) shift=(2,2)"),
    ("grid-window", "grid=(4,8,8) window=(2,4,4)"),
    ("cycle-scan", "window=80"),
]
HEAD = """# Gallery of masks

What each mask method lets a query (downwards) see (to the right), for 256 tokens and the first head. Dark:
every pair of a cell is visible; light: some are. The command above a picture draws it (with `--out`, as a
picture); `python docs/make_gallery.py` draws all of them and writes this page.
"""


def main() -> None:
    """Draw the pictures and write the page."""
    page, folder = [HEAD], DOCS / "images" / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    for number, (slug, settings) in enumerate(PICTURES, 1):
        picture = folder / f"{number:02d}-{slug}.png"
        options = [part for setting in settings.split() for part in ("--set", setting)]
        done = CliRunner().invoke(
            app, ["show", slug, *options, "--out", str(picture)], catch_exceptions=False
        )
        if done.exit_code:
            raise SystemExit(done.output)
        method = methods.find(slug)
        said = (method.__doc__ or "").split("\n\n")[0].strip()
        command = " ".join(["sparseflash show", slug, *(f"--set '{s}'" for s in settings.split())])
        images = sorted(folder.glob(f"{picture.stem}*.png"), key=lambda one: len(one.name))
        page.append(f"## {method.__name__}: {settings.replace(' ', ', ')}\n\n{said}\n\n`{command}`\n")
        page.append(" ".join(f"![{slug}](images/gallery/{one.name})" for one in images) + "\n")
    (DOCS / "gallery.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
