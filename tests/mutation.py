"""Do the tests notice a fault? Small ones are made one at a time in a sample of functions, and the tests run.

    python tests/mutation.py --sample 40 --seed 7 --out faults.csv

Every process that runs tests is a fork of one that has torch and all tests loaded, and a fault is another
code object in a function that is there already: so a fault costs what the tests of its function cost. Which
those are is seen first, in one run of all tests of the area that notes who comes by.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import csv
import gc
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src" / "sparseflash"
AREAS = {
    "plan": (
        "plan/test_*.py",
        *(
            f"ops/test_{name}.py"
            for name in ("semantics", "attention", "decode", "varlen", "jagged", "compile")
        ),
        "methods/test_hash_sparse.py",
        "hosts/test_compat_flex.py",
        "support/test_errors.py",
        "support/test_damaged_files.py",
    ),
    "methods": ("methods/test_*.py", "train/test_reformer.py"),
    "integrations/transformers": ("hosts/test_transformers*.py", "hosts/test_pretrained.py"),
}
"""Parts of the library, each with the tests that are about it."""
EQUAL = HERE / "mutation_equal.csv"
"""Faults that are none: what they change is how fast something is, or nothing; each with the reason."""

NOWHERE = "no such function"
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "amin": "amax", "minimum": "maximum", "any": "all", "cummin": "cummax", "tril": "triu"}
NAMES |= {there: here for here, there in NAMES.items()}

PIECES = {"CELLS", "CHUNK", "ENTRIES", "HELD", "LANES", "SLAB"}
"""How much is held at a time, to bound memory: of any size, what comes out is the same, which has tests."""

PROMISES = {"strict", "disjoint", "unique", "ascending"}
"""What a caller knows of its own lists: without the word it is checked, or made so, and is the same."""


@dataclass(frozen=True)
class Fault:
    """The `n`-th place of a function where something can be another, and what becomes of it there."""

    module: str
    function: str
    n: int
    said: str
    line: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What stays the same when lines move."""
        return self.module, self.function, self.said


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods by their qualified names; what stands inside one is a part of it."""
    todo: list[tuple[str, ast.AST]] = [("", tree)]
    while todo:
        prefix, node = todo.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                if not any("overload" in ast.unparse(x) for x in child.decorator_list):  # no code of its own
                    yield prefix + child.name, child
            elif isinstance(child, (ast.ClassDef, ast.If, ast.Try)):
                name = f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix
                todo.append((name, child))


def twice(node: Any) -> None:
    """Not not x."""
    node.operand = ast.UnaryOp(type(node.op)(), node.operand)


def changes(function: ast.FunctionDef) -> list[tuple[ast.AST, str, Callable[[ast.AST], None]]]:
    """Places of the body where something can be another: the node, words for it, and how to change it.

    0 and 1 become one another: so -1, where any number below 0 means none, becomes one that does not, and
    what is at least 1 may be 0.
    """
    found: list[tuple[ast.AST, str, Callable[[ast.AST], None]]] = []
    todo: list[ast.AST] = list(reversed(function.body))
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.AnnAssign)):
            todo += [node.value] if isinstance(node, ast.AnnAssign) and node.value else []
            continue  # messages, and invariants of our own
        if isinstance(node, ast.keyword) and node.arg in PROMISES:
            continue
        sizes = isinstance(node, (ast.BinOp, ast.Compare)) or ast.unparse(node).startswith(("max(", "min("))
        if sizes and PIECES & {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}:
            continue
        if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
            op = SWAPS[type(node.op)]
            found.append((node, ast.unparse(node), lambda x, op=op: setattr(x, "op", op())))
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
            op = SWAPS[type(node.ops[0])]
            found.append((node, ast.unparse(node), lambda x, op=op: setattr(x, "ops", [op()])))
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            found.append((node, repr(node.value), lambda x: setattr(x, "value", not x.value)))
        elif isinstance(node, ast.Constant) and type(node.value) is int and node.value in (0, 1):
            found.append((node, repr(node.value), lambda x: setattr(x, "value", 1 - x.value)))
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            found.append((node, node.attr, lambda x: setattr(x, "attr", NAMES[x.attr])))
        elif isinstance(node, ast.Name) and node.id in NAMES:
            found.append((node, node.id, lambda x: setattr(x, "id", NAMES[x.id])))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Invert, ast.Not)):
            found.append((node, ast.unparse(node), twice))
        todo += reversed([x for x in ast.iter_child_nodes(node) if not isinstance(x, ast.arguments)])
    return found


def faults(area: str) -> list[Fault]:
    """All that can be made in an area."""
    found = []
    for path in sorted((SOURCE / area).rglob("*.py")):
        module = path.relative_to(SOURCE).as_posix()
        for name, function in functions(ast.parse(path.read_text())):
            for n, (node, said, _) in enumerate(changes(function)):
                found.append(Fault(module, name, n, f"{said} #{n}", getattr(node, "lineno", 0)))
    return found


def equal() -> set[tuple[str, str, str]]:
    """Faults that are known to change nothing."""
    with EQUAL.open(newline="") as file:
        return {(x["module"], x["function"], x["fault"]) for x in csv.DictReader(file)}


def sample(count: int, seed: int, only: str = "") -> list[Fault]:
    """As many of each area, in functions that differ; or all of modules whose names begin with `only`.

    The order is by a hash of the seed and the fault, and those that are known to change nothing are passed
    over: so a sample stays as it is but for the functions that changed.
    """
    known, drawn = equal(), []

    def place(fault: Fault) -> bytes:
        return hashlib.blake2b(repr((seed, fault.key)).encode()).digest()

    areas = [area for area in AREAS if area.startswith(only) or only.startswith(area)]
    for at, area in enumerate(areas):
        every, taken = sorted((x for x in faults(area) if x.module.startswith(only)), key=place), set()
        share = count // len(areas) + (at < count % len(areas))
        for fault in every:
            where = (fault.module, fault.function, fault.n if only else 0)
            if len(taken) < share and where not in taken and fault.key not in known:
                taken.add(where)
                drawn.append(fault)
    return drawn


# ---------------------------------------------------------------- other code in functions that are there


def code_of(fault: Fault, change: Callable[[ast.FunctionDef], None]) -> types.CodeType:
    """The code of a function after a change of its tree, with all that stands inside it."""
    path = SOURCE / fault.module
    tree = ast.parse(path.read_text())
    change(next(x for name, x in functions(tree) if name == fault.function))
    todo = [compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)]
    while todo:
        code = todo.pop()
        if code.co_qualname == fault.function:
            return code
        todo += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    raise LookupError(f"{fault.module} has no {fault.function}")


def broken(fault: Fault) -> types.CodeType:
    """The code with the fault in it."""

    def change(function: ast.FunctionDef) -> None:
        node, _, alter = changes(function)[fault.n]
        alter(node)

    return code_of(fault, change)


def noted(fault: Fault, name: str) -> types.CodeType:
    """The code that notes that it runs."""

    def change(function: ast.FunctionDef) -> None:
        first = ast.parse(f"__seen__.add({name!r})").body[0]
        for one in ast.walk(function):  # a decorator's own call is long over: what it made is called
            if isinstance(one, ast.FunctionDef):
                one.body.insert(int(ast.get_docstring(one) is not None), first)

    return code_of(fault, change)


def put(fault: Fault, code: types.CodeType) -> bool:
    """Put code into the function, however it is wrapped, and into what it has made; whether there is one."""
    path, done = str(SOURCE / fault.module), False
    parts, todo = {}, [code]
    while todo:
        one = todo.pop()
        parts[one.co_qualname, one.co_firstlineno, one.co_freevars] = one
        todo += [x for x in one.co_consts if isinstance(x, types.CodeType)]
    for x in gc.get_objects():
        if type(x) is types.FunctionType and x.__code__.co_filename == path:
            was = x.__code__
            new = parts.get((was.co_qualname, was.co_firstlineno, was.co_freevars))
            if new is not None:
                x.__code__, done = new, True
    return done


# ---------------------------------------------------------------- runs of tests in forks


class Note:
    """A plugin of pytest: what each test takes, and which functions it comes by."""

    def __init__(self, seen: set[str]) -> None:
        self.seen, self.rows = seen, {}

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.seen.clear()

    def pytest_runtest_logreport(self, report: Any) -> None:
        seconds, passed, seen = self.rows.get(report.nodeid, (0.0, True, set()))
        self.rows[report.nodeid] = (seconds + report.duration, passed and not report.failed, seen | self.seen)


class Only:
    """A plugin of pytest: these tests and no others, in this order; the first that fails."""

    def __init__(self, wanted: list[str]) -> None:
        self.place, self.failed = {name: n for n, name in enumerate(wanted)}, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((x for x in items if x.nodeid in self.place), key=lambda x: self.place[x.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


def quiet(*arguments: str, plugin: Any = None) -> None:
    """Run pytest, and say nothing."""
    import pytest

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest.main(["-q", "-x", "-p", "no:cacheprovider", *arguments], [plugin] if plugin else [])


def forked(work: Callable[[], Any], limit: float) -> Any:
    """What `work` returns in a fork of this process; None where it does not end in time, or dies."""
    with tempfile.NamedTemporaryFile("r") as answer:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.setpgid(0, 0)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                Path(answer.name).write_text(json.dumps(work()))
            os._exit(0)
        end = time.monotonic() + limit
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.02)
        return json.loads(answer.read() or "null")


def passers(drawn: list[Fault], files: list[str], limit: float) -> dict[str, list[tuple[float, str]]]:
    """Of each function: the tests that come by and pass, quickest first."""

    def work() -> list[Any]:
        seen: set[str] = set()
        builtins.__seen__ = seen  # type: ignore[attr-defined]  # what `noted` writes to
        for fault in drawn:
            put(fault, noted(fault, f"{fault.module}:{fault.function}"))
        note = Note(seen)
        quiet("--maxfail=1000", *files, plugin=note)
        return [(name, *x[:2], sorted(x[2])) for name, x in note.rows.items()]

    found: dict[str, list[tuple[float, str]]] = {}
    for name, seconds, passed, seen in forked(work, limit) or ():
        for function in seen if passed else ():
            found.setdefault(function, []).append((seconds, name))
    return {function: sorted(tests) for function, tests in found.items()}


def caught(fault: Fault, tests: list[tuple[float, str]], most: float) -> str:
    """The test that fails under the fault; "" if none of those that take `most` seconds together does."""
    wanted, total = [], 0.0
    for seconds, name in tests:
        total += seconds
        if total > most and wanted:
            break
        wanted.append(name)

    def work() -> str:
        if not put(fault, broken(fault)):
            return NOWHERE
        only = Only(wanted)
        quiet(*sorted({str(HERE.parent / x.split("::")[0]) for x in wanted}), plugin=only)
        return only.failed

    verdict = forked(work, 60 + 10 * min(total, most))
    return "no end, or a crash" if verdict is None else verdict


def survivors(path: Path) -> list[Fault]:
    """What no test caught in an earlier run, as far as it can still be made."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["caught"]]
    left = {(row["module"], row["function"], row["fault"]) for row in rows} - equal()
    return [fault for area in AREAS for fault in faults(area) if fault.key in left]


def judge(drawn: list[Fault], out: Path | None = None, most: float = 60.0) -> list[dict[str, Any]]:
    """A row for each fault: what it is, and the test that catches it."""
    import torch

    os.chdir(HERE.parent)
    os.environ["PYTEST_XDIST_WORKER_COUNT"] = str(os.cpu_count() or 1)  # one thread: a fork has no others
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for area, patterns in AREAS.items():
        files = sorted({str(x) for pattern in patterns for x in HERE.glob(pattern)})
        here = [x for x in drawn if x.module.startswith(area)]
        if not here:
            continue
        quiet("--collect-only", *files)  # so that every fork has them loaded
        tests = passers(here, files, 3600)
        for fault in here:
            by = tests.get(f"{fault.module}:{fault.function}", [])
            test = caught(fault, by, most) if by else ""
            if test == NOWHERE:
                raise LookupError(f"{fault.module}:{fault.function} is nowhere in memory: {fault.said}")
            rows.append(
                {
                    "module": fault.module,
                    "function": fault.function,
                    "line": fault.line,
                    "fault": fault.said,
                    "tests": len(by),
                    "caught": test,
                }
            )
            print(
                f"{'caught  ' if test else 'SURVIVED'} {fault.module}:{fault.line} {fault.said}", flush=True
            )
            if out:
                with out.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)
    return rows


def main() -> None:
    """Judge a sample, and exit with 1 where more than one in twenty is not caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a sample of one area or module, such as plan/algebra.py")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", type=Path, help="instead of a sample: what survived, by an earlier --out")
    given = parser.parse_args()
    drawn = survivors(given.again) if given.again else sample(given.sample, given.seed, given.only)
    rows = judge(drawn, given.out)
    score = sum(bool(x["caught"]) for x in rows) / len(rows)
    print(f"{score:.1%} of {len(rows)} faults are caught")
    sys.exit(score < 0.95)


if __name__ == "__main__":
    main()
