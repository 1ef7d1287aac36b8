"""Who may import whom, and what `import sparseflash` must not touch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "sparseflash"

# Each part of the package, and every part it may import. What is not listed here may not exist: a new file
# takes its place in the picture of docs/design.md first. `*` stands for all.
CORE = ("common", "plan")
SHARED = ("backends.numerics", "backends.records")
OPS = (*CORE, *SHARED, "backends.dispatch", "ops")
METHOD = (*OPS, "selection", "cache", "methods")
MAY_IMPORT = {
    "common": (),
    "plan": ("common",),
    "backends.numerics": CORE,
    "backends.records": ("common",),
    "backends": (*CORE, *SHARED),
    "backends.dispatch": (*CORE, "backends"),
    "ops": (*CORE, *SHARED, "backends.dispatch"),
    "selection": OPS,
    "cache": (*OPS, "selection"),
    "methods": METHOD,
    "nn": METHOD,
    "distributed": METHOD,
    "compat": OPS,
    "fusion": ("common",),
    "integrations": ("*",),
    "train": ("*",),
    "bench": ("*",),
    "__main__": ("*",),
    # The surface. It may name everything, but the fresh-process test below says what it must not load.
    "__init__": ("*",),
}

# Functions that import what their first argument names.
BY_NAME = ("import_module", "__import__")

# Third-party packages other than torch, and where they may be imported: (place, inside a function only?).
THIRD_PARTY = {
    "triton": {"backends.triton": False, "fusion": False},
    "transformers": {"integrations.transformers": False, "bench": True},
    "diffusers": {"integrations.diffusers": False},
    "vllm": {"integrations.vllm": False},
    "numpy": {"train": False, "bench": False},
    "safetensors": {
        "train": False,
        "bench.capture": False,
        "cache.files": True,
        "methods.gates": True,
        "integrations.transformers.pretrained": True,
    },
    "gguf": {"integrations.transformers.pretrained": True},
    "rich": {"train": False, "bench": False, "__main__": False, "selection.calibrate": True},
    "typer": {"__main__": False, "bench.commands": False},
    "pynvml": {"bench": True},
    "attn_gym": {"bench": True},
    "fla": {"bench": True},
    "scipy": {"plan": True, "bench": True},
    "matplotlib": {"plan": True, "train": True, "bench": True},
}


def module_name(path: Path, package: Path) -> str:
    """`plan.build` of plan/build.py, `plan` of plan/__init__.py, `__init__` of the package's own."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """Name the part of the picture that a module belongs to: `plan` for `plan.lists`."""
    top = ".".join(module.split(".")[:2])
    return top if top in MAY_IMPORT else module.split(".")[0]


def imports_of(path: Path, package: Path):
    """Yield (line, dotted name, inside a function?) of every import of a file, wherever it stands.

    Names within the package are spelled `sparseflash.x.y`, or by the name of whatever folder it is. Imports
    inside functions and under TYPE_CHECKING count: knowing of a module is what the rule is about. So do
    `import_module("...")` with a constant.
    """
    here = [package.name, *path.relative_to(package).with_suffix("").parts][:-1]

    def absolute(name: str, level: int) -> str:
        return ".".join([*here[: len(here) - level + 1], *([name] if name else [])]) if level else name

    def visit(node, inside):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name, inside) for alias in node.names)
            case ast.ImportFrom():
                base = absolute(node.module or "", node.level)
                yield from ((node.lineno, f"{base}.{alias.name}", inside) for alias in node.names)
            case ast.Call(func=ast.Attribute(attr=called) | ast.Name(id=called)) if called in BY_NAME:
                match node.args:
                    case [ast.Constant(value=str(name)), *_]:
                        level = len(name) - len(name.lstrip("."))
                        yield node.lineno, absolute(name[level:], level), inside
                    case _:
                        yield node.lineno, "", inside
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)


def existing(name: str, package: Path) -> str:
    """Cut names that are no module off the end: `sparseflash.plan.Plan` -> `plan`, the package -> ''."""
    parts = name.split(".")[1:]
    while parts:
        at = package.joinpath(*parts)
        if at.with_suffix(".py").exists() or at.is_dir():
            break
        parts.pop()
    return ".".join(parts)


def violations(package: Path) -> list[str]:
    """Every import of the package that the picture does not allow, as `file:line: what is wrong`."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        module = module_name(path, package)
        part = part_of(module)

        def complain(line, message, path=path):
            wrong.append(f"{path.relative_to(package.parent)}:{line}: {message}")

        if part not in MAY_IMPORT:
            complain(1, f"{part} has no place in the import picture (MAY_IMPORT)")
            continue
        for line, name, inside in imports_of(path, package):
            top = name.split(".")[0]
            if not name:
                if part not in ("backends.dispatch", "__init__") and module != "common.moved":
                    complain(line, f"{module} imports a module by a computed name")
            elif top == "sparseflash":
                target = existing(name, package)
                target_part = part_of(target)
                if not target:
                    if "*" not in MAY_IMPORT[part] and part != "__init__":
                        complain(line, f"{module} imports the surface ({name}); import the part it needs")
                elif target_part == part:
                    if strangers(module, target, is_package=path.name == "__init__.py"):
                        complain(line, f"{module} imports its neighbour {target}")
                elif target_part not in MAY_IMPORT[part] and "*" not in MAY_IMPORT[part]:
                    complain(line, f"{module} imports {target}; it may import {', '.join(MAY_IMPORT[part])}")
            elif top not in sys.stdlib_module_names and top != "torch":
                places = THIRD_PARTY.get(top, {})
                place = next((p for p in places if f"{module}.".startswith(f"{p}.")), None)
                if place is None:
                    complain(line, f"{module} imports {top}, allowed in: {', '.join(places) or 'no place'}")
                elif places[place] and not inside:
                    complain(
                        line, f"{module} imports {top} at its top; import it in the function that uses it"
                    )
    return wrong


def strangers(module: str, target: str, *, is_package: bool) -> bool:
    """Tell whether two modules of one part must not know each other: backends, and methods."""
    part, *inner = module.split(".")
    target_inner = target.split(".")[1:]
    if part == "backends":
        return bool(inner and target_inner) and inner[0] != target_inner[0]
    if part == "methods":  # a package lists what is below it, a method knows what a method is and no other
        shared = ("base", "blocks", "denoising", "gates", "reading", "rotary")
        ground = target_inner in ([name] for name in shared) and target_inner != inner
        ground |= target_inner == ["heads"] and inner in (["base"], ["profiled"])
        return not (is_package and target_inner[: len(inner)] == inner) and not ground
    return False


def circles(package: Path) -> set[frozenset[str]]:
    """Groups of files that import one another, wherever in a file the imports stand.

    `from . import x` is an import of the file x; that Python runs the packages above it first is not counted.
    """
    files = {module_name(path, package): path for path in package.rglob("*.py")}
    arrows = {
        module: {
            existing(name, package) or "__init__"
            for _, name, _ in imports_of(path, package)
            if name.split(".")[0] == package.name
        }
        & files.keys() - {module}
        for module, path in files.items()
    }

    def reached(module):
        seen, todo = set(), [module]
        while todo:
            new = arrows[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reach = {module: reached(module) for module in files}
    return {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in files
        if module in reach[module]
    }


@pytest.mark.parametrize("package", [PACKAGE, PACKAGE.parents[1] / "benchmarks"], ids=lambda x: x.name)
def test_no_files_import_one_another_in_a_circle(package):
    assert [sorted(circle) for circle in circles(package)] == []


def test_the_top_of_the_package_can_be_read_at_a_glance():
    every = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    rooms = every - {"__init__", "__main__", "__pycache__"}
    assert len(rooms) <= 14, sorted(rooms)


def test_functions_of_the_plan_are_short():
    long = [
        f"{path.name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in sorted((PACKAGE / "plan").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - (node.body[0].end_lineno or 0) > 60
    ]
    assert long == []


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"a": "from . import b", "b": "import torch"}, []),
        ({"a": "from . import b", "b": "def f():\n    from sparseflash.a import x"}, [["a", "b"]]),
        ({"a": "from .b import x", "b": "from .c import x", "c": "import sparseflash.a"}, [["a", "b", "c"]]),
        ({"a": "from . import b, c", "b": "from .c import x", "c": ""}, []),
        ({"a": "from .b import x", "b": "from .a import x", "c": "from .a import x"}, [["a", "b"]]),
        (
            {"a": "import sparseflash", "__init__": "from .b import x", "b": "from .a import x"},
            [["__init__", "a", "b"]],
        ),
        ({"p/__init__": "from .a import x", "p/a": "from . import b", "p/b": ""}, []),
        ({"p/__init__": "from .a import x", "p/a": "from ..p import x"}, [["p", "p.a"]]),
    ],
)
def test_the_walk_sees_circles(tmp_path, files, found):
    package = tmp_path / "sparseflash"
    for name, source in files.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert [sorted(circle) for circle in circles(package)] == found


def test_every_import_of_the_package_is_in_the_picture():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("plan.py", "from .ops import attention", "plan imports ops"),
        ("plan.py", "import sparseflash.ops", "plan imports ops"),
        ("plan.py", "def f():\n    from sparseflash import ops", "plan imports ops"),
        ("plan.py", "from sparseflash import Plan", "imports the surface"),
        ("plan.py", "import numpy", "imports numpy"),
        ("plan.py", "import matplotlib", "in the function that uses it"),
        ("plan.py", "def f():\n    import matplotlib.pyplot", None),
        ("plan.py", "import math, torch", None),
        ("ops/decode.py", "from .. import plan\nfrom ..backends import dispatch", None),
        ("ops/decode.py", "from .attention import attention", None),
        ("ops/decode.py", "from ..backends import reference", "ops.decode imports backends.reference"),
        ("ops/decode.py", "from ..backends.cpu import Cpu", "ops.decode imports backends.cpu"),
        (
            "ops/packing.py",
            "import importlib\nimportlib.import_module('sparseflash.methods')",
            "imports methods",
        ),
        (
            "ops/packing.py",
            "import importlib\nimportlib.import_module('..backends.cpu', __package__)",
            "backends.cpu",
        ),
        ("ops/packing.py", "import importlib\nimportlib.import_module(name)", "computed name"),
        ("backends/dispatch.py", "import importlib\nimportlib.import_module(name)", None),
        ("backends/reference.py", "from ..plan import Plan", None),
        ("backends/reference.py", "from .cpu import build", "imports its neighbour backends.cpu"),
        ("backends/reference.py", "from . import cpu", "imports its neighbour backends.cpu"),
        (
            "backends/reference.py",
            "from .dispatch import Backend",
            "backends.reference imports backends.dispatch",
        ),
        ("backends/cpu/__init__.py", "from .build import build", None),
        ("backends/cpu/__init__.py", "import triton", "imports triton"),
        ("backends/triton/__init__.py", "import triton", None),
        ("methods/__init__.py", "from .b import B", None),
        ("methods/a.py", "from . import b", "imports its neighbour methods.b"),
        ("methods/a.py", "from .b import B", "imports its neighbour methods.b"),
        ("methods/a.py", "from .base import Method", None),
        ("methods/a.py", "from ..nn import Attention", "imports nn"),
        ("__main__.py", "import typer, numpy", "imports numpy"),
        ("train/loop.py", "from .. import nn, methods", None),
        ("novelty.py", "", "no place in the import picture"),
    ],
)
def test_the_walk_sees_what_it_should(tmp_path, file, source, complaint):
    package = tmp_path / "sparseflash"
    modules = [
        "plan",
        "ops/__init__",
        "ops/attention",
        "backends/dispatch",
        "methods/base",
        "common/errors",
        "nn",
        "backends/reference",
        "backends/cpu/build",
    ]
    for name in (*modules, "methods/b"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text("")
    target = package / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(source)
    found = violations(package)
    if complaint is None:
        assert found == []
    else:
        assert len(found) == 1 and complaint in found[0], found


# Run in a fresh process. Blocked packages behave as if they were not installed; from the moment torch is in,
# every attempt to load one of them, to start a program or to open a shared library is written down.
FRESH = """
import sys

BLOCKED = set("triton transformers diffusers vllm matplotlib typer rich numpy safetensors".split())
touched = []


class WithoutTheBlocked:
    # A finder of this interpreter that does not find the blocked packages.
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            touched.append(f"import {name}")
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [WithoutTheBlocked(finder) for finder in sys.meta_path]
import warnings

warnings.simplefilter("ignore")  # torch remarks that numpy is missing
import torch

torch.zeros(1).tolist()
touched.clear()
programs = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen"}
sys.addaudithook(lambda event, args: touched.append(f"{event} {args[:1]}") if event in programs else None)

import sparseflash as sf

print("touched on import:", touched)
print("gpu initialised:", torch.cuda.is_initialized())
print("extras loaded:", sorted(BLOCKED & {m.partition(".")[0] for m in sys.modules}))

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 37, 16, requires_grad=True).unbind()
out = sf.attention(q, k, v, causal=True)
mask = torch.ones(37, 37, dtype=torch.bool).tril()
dense = ((q @ k.mT) / 4).masked_fill(~mask, float("-inf")).softmax(-1) @ v
same = torch.allclose(out, dense, atol=1e-5)
grads = [torch.autograd.grad(o.sin().sum(), (q, k, v), retain_graph=True) for o in (out, dense)]
print("attention is right:", same and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads)))
print("usable:", [name for name, status in sf.backend_status().items() if status.usable])
"""


def test_a_fresh_import_touches_nothing_and_attention_works_without_a_compiler(tmp_path):
    """No triton, transformers, numpy, plotting or command-line package; no compiler, GPU or cache."""
    bare = {n: v for n, v in os.environ.items() if not n.startswith(("CC", "CXX", "SPARSEFLASH_"))}
    places = {"PATH": "no-programs", "HOME": "home", "XDG_CACHE_HOME": "cache"}
    bare |= {name: str(tmp_path / folder) for name, folder in places.items()}
    command = [sys.executable, "-c", FRESH]
    run = subprocess.run(command, capture_output=True, text=True, env=bare, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    said = dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)
    assert said["touched on import"] == "[]"
    assert said["gpu initialised"] == "False"
    assert said["extras loaded"] == "[]"
    assert said["attention is right"] == "True", run.stderr
    assert said["usable"] == "['reference']"
