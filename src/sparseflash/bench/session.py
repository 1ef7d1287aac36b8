"""The benchmarks in a terminal: progress, tables, CSV files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sparseflash.bench import breakeven as breakeven_
from sparseflash.bench import cases, figures, harness, results
from sparseflash.bench import compare as compare_
from sparseflash.bench import coverage as coverage_
from sparseflash.bench import curves as curves_
from sparseflash.bench import decode as decode_
from sparseflash.bench import documents as documents_
from sparseflash.bench import energy as energy_
from sparseflash.bench import indexer as indexer_
from sparseflash.bench import kernels as kernels_
from sparseflash.bench import levels as levels_
from sparseflash.bench import long_run as long_run_
from sparseflash.bench import masks as masks_
from sparseflash.bench import mqar as mqar_
from sparseflash.bench import ops as ops_
from sparseflash.bench import pixels as pixels_
from sparseflash.bench import plan_costs as plan_costs_
from sparseflash.bench import steps as steps_
from sparseflash.bench import table as table_
from sparseflash.bench.machine import describe
from sparseflash.errors import SparseFlashError
from sparseflash.train.data import load, stdlib


def curves(out: Path, *, minutes: float, lengths: Sequence[int], heads: int, dim: int, dtype: str) -> None:
    """Measure the runtime curves into `out`."""
    _known(dtype)
    _positive(lengths)
    rows = _watch(
        "curves",
        out,
        lambda on_run: curves_.measure(
            cases.curves(),
            lengths=sorted(lengths),
            minutes=minutes,
            heads=heads,
            dim=dim,
            dtype=dtype,
            on_run=on_run,
        ),
    )
    _finish(rows, out, ("case", "T", "ms", "speedup", "density", "recall", "note"))


def attention(settings: harness.Settings, out: Path) -> None:
    """Measure methods against baselines into ``attention.csv`` of a directory, a picture beside it."""
    _known(settings.dtype)
    if settings.direction not in cases.DIRECTIONS:
        raise SparseFlashError(
            f"--direction {settings.direction!r} is unknown; choose from: {', '.join(cases.DIRECTIONS)}"
        )
    _positive(settings.lengths)
    settings.subjects(min(settings.lengths))  # an unknown name is told before anything runs
    file = out / "attention.csv"
    rows = _watch("attention", file, lambda on_run: harness.measure(settings, on_run=on_run))
    over = [x for x in rows[-1] if x.startswith("over ") and not x.startswith("over naive")][:2]
    columns = ("case", "T", "conformance", "ms", "ms_select", *over, "density", "recall", "error", "peak_mb")
    _finish(rows, file, (*columns, *(("joules_net",) if settings.energy else ()), "note"))
    for picture in figures.redraw(file):
        print(picture)


def capture(
    out: Path, *, model: str, run: Path | None, data: str, length: int, layers: Sequence[int]
) -> None:
    """Capture q, k, v of a model over the first held-out bytes of a text into `out`."""
    import torch

    from sparseflash.bench import capture as capture_

    if bool(model) == (run is not None):
        raise SparseFlashError("name one model: --model of Transformers, or --run of sparseflash train")
    corpus = load(data) if data else stdlib()
    text = next(iter(corpus.validation(length, 1)))[0]
    if run is not None:
        from sparseflash.train.sample import load_model

        own, _ = load_model(run)
        found = capture_.capture(lambda: own(text), layers)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        theirs = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval()
        said = bytes(text[0].to(torch.uint8).tolist()).decode("utf-8", "replace")
        tokens = AutoTokenizer.from_pretrained(model)(said, return_tensors="pt").input_ids
        found = capture_.capture(lambda: theirs(tokens), layers)
    about = {"model": model or f"sparseflash train, {run}", "text": corpus.name, "git": describe()["git"]}
    size = capture_.save(found, out, about)
    print(f"{out}: {len(found) // 3} layers of {list(next(iter(found.values())).shape)}, {size:.1f} MB")


def plot(directory: Path, out: Path | None) -> None:
    """Redraw every picture of a directory."""
    figures.redraw(directory, out, on_file=print)


def compare(before: Path, after: Path) -> bool:
    """Print what changed between two result files or directories; whether nothing became slower."""
    from rich.console import Console
    from rich.table import Table

    pairs = [(before, after)]
    if before.is_dir() and after.is_dir():
        pairs = [(x, after / x.name) for x in sorted(before.glob("*.csv")) if (after / x.name).is_file()]
    for path in (x for pair in pairs or [(before, after)] for x in pair):
        if not path.is_file():
            raise SparseFlashError(f"{path}: no result file; name two CSV files, or two directories of them")
    changes = [x for a, b in pairs for x in compare_.compare(results.read(a), results.read(b))]
    worse = [x for x in changes if x.regression]
    console = Console(soft_wrap=True)
    if worse:
        table = Table("row", "figure", "before", "after", "slower by")
        for x in worse:
            table.add_row(x.row, x.column, f"{x.before:.4g}", f"{x.after:.4g}", f"{x.slower - 1:.0%}")
        console.print(table)
    console.print(f"{len(changes)} figures compared, {len(worse)} slower by more than {compare_.LIMIT:.0%}")
    return not worse


def energy() -> bool:
    """Test the energy counter of this machine; whether it measures."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    meter, why = energy_.counter(device)
    if meter is None:
        print(f"energy: null ({why})")
        return False
    x = torch.randn(1024, 1024, device=device)
    wrong = energy_.self_test(lambda: x @ x, meter)
    print(f"energy: {meter.name}: " + ("; ".join(wrong) or "linear in time, idle is idle"))
    return not wrong


def breakeven(
    out: Path,
    *,
    lengths: Sequence[int],
    dims: Sequence[int],
    dtypes: Sequence[str],
    rounds: int,
    minutes: float,
) -> None:
    """Measure where sparse beats dense into `out`, and leave the costs that `explain` reads."""
    _known(*dtypes)
    _positive(lengths)
    rows = _watch(
        "breakeven",
        out,
        lambda on_run: breakeven_.measure(
            lengths=lengths, dims=dims, dtypes=dtypes, rounds=rounds, minutes=minutes, on_run=on_run
        ),
    )
    costs = breakeven_.fitted(rows)
    rows = list(breakeven_.predicted(rows, costs))
    results.write(out, rows)
    edges = breakeven_.edges(rows)
    results.write(out.with_stem(f"{out.stem}-edges"), edges)
    _finish(edges, out, ("case", "T", "direction", "dtype", "edge", "note"))
    figures.redraw(out)
    off = sorted(abs(row["off"]) for row in rows if row["held_out"])
    middle, close = off[len(off) // 2], sum(x <= 0.25 for x in off) / len(off)
    print(
        f"gain predicted for {len(off)} points left out of the fit: off by {middle:.0%} in the median, "
        f"{close:.0%} of them by at most 25 %, {off[-1]:.0%} at most"
    )
    print(f"{costs.save()}: costs for sparseflash.explain")


def coverage(out: Path, *, lengths: Sequence[int], capture: Path | None) -> None:
    """Measure which equal-bucket pairs are attended into `out`."""
    _positive(lengths)
    captured = None
    if capture is not None:
        import torch

        from sparseflash.bench.capture import inputs

        captured = inputs(capture, dtype=torch.float32)
    rows = _watch(
        "coverage",
        out,
        lambda on_run: coverage_.measure(lengths=sorted(lengths), captured=captured, on_run=on_run),
    )
    _finish(rows, out, ("case", "inputs", "T", "nb", "coverage"))
    figures.redraw(out)


def pixels(out: Path, *, images: Path, steps: int, seed: int) -> None:
    """Train on images, pixel after pixel, into `out`."""
    read = pixels_.read_idx(images)
    rows = _watch("pixels", out, lambda on_run: pixels_.measure(read, steps=steps, seed=seed, on_run=on_run))
    _finish(rows, out, ("case", "perplexity", "bits", "steps", "s_per_step"))
    figures.redraw(out)


def mqar(out: Path, *, names: Sequence[str], steps: int, seed: int) -> bool:
    """Train on associative recall into `out`; whether what has to solve it does, and nothing else."""
    for name in names:
        if name not in mqar_.ATTENTIONS:
            raise SparseFlashError(f"--cases has {name!r}; choose from: {'; '.join(mqar_.ATTENTIONS)}")
    rows = _watch(
        "mqar",
        out,
        lambda on_run: mqar_.measure(
            attentions=names or tuple(mqar_.ATTENTIONS), steps=steps, seed=seed, on_run=on_run
        ),
    )
    _finish(rows, out, ("case", "lr", "accuracy", "best", "steps", "seconds", "density"))
    figures.redraw(out)
    wrong = mqar_.verdict(rows)
    print(
        "; ".join(wrong) or "as it has to be: " + ", ".join(mqar_.MUST_SOLVE) + " solve it, nothing else does"
    )
    return not wrong


def long_run(
    out: Path,
    *,
    data: str,
    runs: Path,
    cases: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    length: int,
    rounds: int,
    minutes: float,
    models: Path | None,
    **shape: int,
) -> None:
    """Train what `out` does not hold yet, time a step of every case, and keep the weights in `models`."""
    _positive([length, steps])
    for name in cases:
        if name not in long_run_.CONTENDERS:
            raise SparseFlashError(f"--cases has {name!r}; choose from: {'; '.join(long_run_.CONTENDERS)}")
    corpus = load(data) if data else stdlib()
    wanted = long_run_.plan_runs(
        cases or tuple(long_run_.CONTENDERS), rates=rates, seeds=seeds, steps=steps, length=length, **shape
    )
    known = list(results.read(out)) if out.is_file() else []
    todo = long_run_.unfinished(wanted, known)
    keys = {run.key for run in todo}
    kept = [row for row in known if long_run_.key(row) not in keys]
    rows = _watch("long run", out, lambda on_run: long_run_.measure(todo, corpus, runs, on_run=on_run), kept)
    if rounds:
        timed = _watch(
            "step times",
            out.with_stem(f"{out.stem}-step"),
            lambda on_run: long_run_.step_times(
                wanted, corpus, rounds=rounds, minutes=minutes, on_run=on_run
            ),
        )
        rows = long_run_.with_minutes(rows, timed)
        results.write(out, rows)
    _finish(
        rows,
        out,
        ("case", "lr", "seed", "steps", "bpb", "bpb_train", "minutes"),
        shown=lambda row: str(row["step"]) == str(row["steps"]),
    )
    figures.redraw(out)
    for run in wanted if models else ():
        if (runs / run.directory).is_dir() and not long_run_.CONTENDERS[run.case].chance:
            print(long_run_.keep_weights(run, runs, models))


def attention_table(out: Path, *, length: int, dtypes: Sequence[str], rounds: int, minutes: float) -> None:
    """Measure the attention table into `out`."""
    _known(*dtypes)
    rows = _watch(
        "attention table",
        out,
        lambda on_run: table_.measure(
            length=length, dtypes=tuple(dtypes), rounds=rounds, minutes=minutes, on_run=on_run
        ),
    )
    _finish(rows, out, ("case", "dtype", "ms_sdpa", "ms", "ratio", "rounds"))


def kernel_table(out: Path, *, dtypes: Sequence[str], rounds: int, minutes: float) -> None:
    """Measure the kernel table into `out`."""
    _known(*dtypes)
    rows = _watch(
        "kernel table",
        out,
        lambda on_run: kernels_.measure(dtypes=tuple(dtypes), rounds=rounds, minutes=minutes, on_run=on_run),
    )
    _finish(rows, out, ("case", "dtype", "T", "heads", "dim", "density", "ms_sdpa", "ms", "ratio"))


def levels(out: Path, *, names: Sequence[str], rounds: int, minutes: float) -> None:
    """Measure the instruction-set levels into `out`."""
    able = levels_.runnable()
    for name in names:
        if name not in able:
            raise SparseFlashError(f"--levels {name!r} does not run here; choose from: {', '.join(able)}")
    rows = _watch(
        "levels",
        out,
        lambda on_run: levels_.measure_levels(names or able, rounds=rounds, minutes=minutes, on_run=on_run),
    )
    _finish(rows, out, ("level", "case", "dtype", "T", "dim", "ms_sdpa", "ms", "ratio"))


def ops(out: Path, *, dtypes: Sequence[str], rounds: int, minutes: float) -> None:
    """Measure linear attention and stick-breaking into `out`."""
    _known(*dtypes)
    rows = _watch(
        "ops",
        out,
        lambda on_run: ops_.measure(dtypes=tuple(dtypes), rounds=rounds, minutes=minutes, on_run=on_run),
    )
    _finish(rows, out, ("case", "dtype", "T", "heads", "ms_sdpa", "ms_torch", "ms", "ratio", "ratio_torch"))


def decode(out: Path, *, mib: int, dtypes: Sequence[str], rounds: int, minutes: float) -> None:
    """Measure how fast decode reads its cache into `out`."""
    _known(*dtypes)
    _positive([mib])
    rows = _watch(
        "decode",
        out,
        lambda on_run: decode_.measure(mib=mib, dtypes=dtypes, rounds=rounds, minutes=minutes, on_run=on_run),
    )
    _finish(
        rows, out, ("case", "dtype", "group", "dim", "gbs_read", "gbs", "share", "ms_sdpa", "ms", "ratio")
    )


def indexer(
    out: Path, *, lengths: Sequence[int], dtypes: Sequence[str], topk: int, rounds: int, minutes: float
) -> None:
    """Measure learned sparse attention into `out`."""
    _known(*dtypes)
    _positive(lengths)
    rows = _watch(
        "indexer",
        out,
        lambda on_run: indexer_.measure(
            lengths=lengths, dtypes=dtypes, topk=topk, rounds=rounds, minutes=minutes, on_run=on_run
        ),
    )
    columns = ("case", "dtype", "T", "topk", "ms_plain", "ms", "ratio", "mb_plain", "mb", "mb_ratio", "note")
    _finish(rows, out, columns)


def models(
    out: Path,
    *,
    names: Sequence[str],
    what: Sequence[str],
    lengths: Sequence[int],
    dtypes: Sequence[str],
    rounds: int,
    minutes: float,
) -> None:
    """Measure layers of Transformers models into `out`, whose other rows stay."""
    from sparseflash.bench import models as models_

    _known(*dtypes)
    _positive(lengths)
    for option, given, known in (("models", names, models_.SUBJECTS), ("what", what, models_.WHAT)):
        for name in given:
            if name not in known:
                raise SparseFlashError(f"--{option} has {name!r}; choose from: {'; '.join(known)}")
    wanted = list(itertools.product(names or models_.SUBJECTS, dtypes, what or models_.WHAT, lengths))
    keys = {tuple(map(str, key)) for key in wanted}
    known_rows = results.read(out) if out.is_file() else []
    kept = [row for row in known_rows if (row["model"], row["dtype"], row["what"], row["T"]) not in keys]
    rows = _watch(
        "transformers",
        out,
        lambda on_run: models_.measure(wanted, rounds=rounds, minutes=minutes, on_run=on_run),
        kept,
    )
    columns = ("model", "what", "method", "dtype", "T", "ms_stock", "ms", "ratio", "mb_stock", "mb", "note")
    _finish(rows, out, columns)


def plan_costs(out: Path, *, length: int, rounds: int, minutes: float) -> None:
    """Measure what plans cost into `out`."""
    rows = _watch(
        "plan costs",
        out,
        lambda on_run: plan_costs_.measure(length=length, rounds=rounds, minutes=minutes, on_run=on_run),
    )
    _finish(rows, out, ("case", "ms", "ms_make", "ms_make_and_prepare", "share", "against", "ratio"))


def masks(
    out: Path,
    *,
    lengths: Sequence[int],
    names: Sequence[str],
    dtype: str,
    rounds: int,
    minutes: float,
    flex: bool,
) -> None:
    """Measure boolean masks into `out`."""
    _known(dtype)
    for name in names:
        if name not in masks_.CASES:
            raise SparseFlashError(f"--cases has {name!r}; choose from: {', '.join(masks_.CASES)}")
    rows = _watch(
        "masks",
        out,
        lambda on_run: masks_.measure(
            lengths=lengths,
            cases=names or tuple(masks_.CASES),
            dtype=dtype,
            rounds=rounds,
            minutes=minutes,
            flex=flex,
            on_run=on_run,
        ),
    )
    columns = ("case", "T", "tiles", "ms_sdpa", "ms", "ratio", "over_dense", "ms_build", "ratio_flex")
    _finish(rows, out, (*columns, "build_share", "build_share_eager", "note"))


def step(
    out: Path, *, data: str, lengths: Sequence[int], dtypes: Sequence[str], rounds: int, minutes: float
) -> None:
    """Measure whole training steps into `out`."""
    _known(*dtypes)
    corpus = load(data) if data else stdlib()
    rows = _watch(
        "training steps",
        out,
        lambda on_run: steps_.measure(
            corpus, lengths=lengths, dtypes=dtypes, rounds=rounds, minutes=minutes, on_run=on_run
        ),
    )
    _finish(rows, out, ("case", "T", "dtype", "ms", "speedup", "tokens_per_s", "rounds"))


def documents(
    out: Path, *, data: str, tokens: int, longest: int, dtypes: Sequence[str], rounds: int, minutes: float
) -> None:
    """Measure packed against padded documents into `out`."""
    _known(*dtypes)
    if tokens < 2 * longest or longest < documents_.SHORTEST:
        raise SparseFlashError(
            f"--tokens {tokens} --longest {longest}: expected --longest of at least {documents_.SHORTEST}, "
            "and --tokens of at least twice that"
        )
    corpus = load(data) if data else stdlib()
    rows = _watch(
        "documents",
        out,
        lambda on_run: documents_.measure(
            corpus,
            tokens=tokens,
            longest=longest,
            dtypes=dtypes,
            rounds=rounds,
            minutes=minutes,
            on_run=on_run,
        ),
    )
    _finish(
        rows, out, ("what", "mix", "dtype", "case", "padding", "tokens_per_s", "over_sdpa", "over_padded")
    )


def _known(*dtypes: str) -> None:
    for dtype in dtypes:
        if dtype not in cases.DTYPES:
            raise SparseFlashError(f"--dtype {dtype!r} is unknown; choose from: {', '.join(cases.DTYPES)}")


def _positive(lengths: Sequence[int]) -> None:
    for length in lengths or (0,):
        if length < 1:
            raise SparseFlashError(
                f"--lengths has {length}; expected positive numbers such as 1024,2048,4096"
            )


def _watch(
    title: str,
    out: Path,
    measure: Callable[[Callable[[str], None]], Iterable[results.Row]],
    kept: Iterable[results.Row] = (),
) -> list[results.Row]:
    """Measure behind a spinner; each row is in `out`, behind the `kept` ones, as soon as it is there."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    sheet = results.Sheet(out, kept)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
        task = bar.add_task(title, total=None)
        for row in measure(lambda text: bar.update(task, description=f"{title}: {text}")):
            sheet.append(row)
        bar.update(task, description=title, total=1, completed=1)
    return sheet.rows


def _finish(
    rows: list[results.Row],
    out: Path,
    columns: Sequence[str],
    shown: Callable[[results.Row], bool] = lambda row: True,
) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = describe()
    table = Table(
        title=f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}",
        title_justify="left",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "note") else "right")
    for row in filter(shown, rows):
        red = "red" if str(row.get("conformance", "")).startswith("FAILED") else None
        table.add_row(*(results.cell(row.get(column)) for column in columns), style=red)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"{out}: {len(rows)} rows")
