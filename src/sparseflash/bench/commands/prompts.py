"""Commands for long prompts of real models: measure a method, recommend one, calibrate heads."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseflash.bench.commands import options
from sparseflash.common.errors import SparseFlashError

from .app import integers

Model = Annotated[
    str,
    typer.Option(help="smollm2 or gemma3 (see: sparseflash bench models), a folder, a name of Transformers."),
]
Text = Annotated[
    list[Path],
    typer.Option("--text", help="A text file, whose first tokens are the prompt; may be repeated."),
]
Tokens = Annotated[int, typer.Option(min=64, help="Of the prompt.")]
Layers = Annotated[
    str, typer.Option(help="Layers that get the method; by default all without a window of their own.")
]
Dtype = Annotated[str, typer.Option(help="Of the weights: fp32 or bf16.")]
SHOWN = (
    "case", "ms", "gain", "attention_gain", "read", "kept", "recall", "recall_worst", "aware", "loss", "kl",
    "note",
)  # fmt: skip


def prefill(
    text: Text,
    method: Annotated[
        str, typer.Option(help="One that sparseflash methods lists, or spec-prefill.")
    ] = "minference",
    changes: Annotated[list[str] | None, options.changes()] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Or a profile: a method of its own for every head of every layer.")
    ] = None,
    last_dense: Annotated[
        int, typer.Option(min=0, help="Last rows of the prompt that see everything, whatever the method.")
    ] = 0,
    model: Model = "smollm2",
    tokens: Tokens = 4096,
    layers: Layers = "",
    dtype: Dtype = "fp32",
    new: Annotated[int, typer.Option(min=1, help="Next tokens whose probabilities are compared.")] = 48,
    rounds: Annotated[int, typer.Option(min=0, help="Times of each, in turn; 0 takes none.")] = 3,
    out: Annotated[Path, typer.Option(help="CSV file of the rows; an existing one is replaced.")] = Path(
        "bench/prefill.csv"
    ),
) -> None:
    """Measure what a method does to the prompts of a real model, beside dense attention.

    **sparseflash prefill --text book.txt --method minference --set vertical=500 --set slash=700**

    ms: time to the first token, and gain: speed-up over our dense attention; attention_gain: that of
    attention only. kept: share of the causal pairs that the method sees; recall: share of dense attention's
    mass on them; aware: share of the heads that FlexPrefill found query-aware. loss: on the prompt, nats per
    token. kl: divergence of the next tokens' probabilities from those after a dense prompt.

    **sparseflash prefill --text book.txt --method spec-prefill --set keep=0.3**

    spec-prefill reads a share of the tokens (read), which an early layer of the model chooses, or a smaller
    model with the same tokenizer (**--set draft=FOLDER**). Random tokens, and the first and last ones, stand
    beside it.
    """
    from sparseflash import methods
    from sparseflash.bench import prompts
    from sparseflash.bench.session import session
    from sparseflash.selection.calibrate import Profile

    chosen: Any
    if profile is not None and changes:
        raise SparseFlashError(
            "--set and --profile: a profile has the settings of every head; give one of them"
        )
    if profile is not None:
        method, chosen = f"profile {profile.name}", methods.Profiled(Profile.load(profile))
    elif method == "spec-prefill":
        if last_dense or layers:
            raise SparseFlashError(
                "--method spec-prefill reads fewer tokens in all layers: leave --last-dense and --layers out"
            )
        chosen = None
    else:
        chosen = methods.get(method, **options.settings(changes))
    if last_dense and chosen is not None:
        chosen = methods.LastDense(chosen, rows=last_dense)
    cases = _speculations(options.settings(changes)) if chosen is None else {method: chosen}
    prepared = _prompts(model, text, tokens, dtype, new)
    for path, prompt in zip(text, prepared, strict=True):
        named = out if len(text) == 1 else out.with_stem(f"{out.stem}-{path.stem}")
        given: dict[str, Any] = {"layers": integers(layers) or None, "rounds": rounds}
        session(path.name, named, partial(prompts.measure, prompt, cases, **given), SHOWN)


def _speculations(given: dict[str, Any]) -> dict[str, Any]:
    """SpecPrefill by what judges, as given and as controls that judge nothing."""
    from sparseflash.integrations.transformers import SpecPrefill, load

    if known := set(given) - {field.name for field in dataclasses.fields(SpecPrefill)}:
        raise SparseFlashError(
            f"spec-prefill has no hyper-parameter {sorted(known)[0]!r}: it has "
            + ", ".join(field.name for field in dataclasses.fields(SpecPrefill))
        )
    draft = given.pop("draft", None)
    how = SpecPrefill(draft=None if draft is None else load(draft)[0], **given)
    cases = {"spec-prefill": how}
    if how.by == "attention":
        named: dict[Any, str] = {"random": "random tokens", "ends": "first and last tokens"}
        cases |= {name: dataclasses.replace(how, by=by, draft=None) for by, name in named.items()}
    return cases


def recommend(
    text: Text,
    model: Model = "smollm2",
    tokens: Tokens = 4096,
    max_kl: Annotated[
        float, typer.Option(min=0, help="The most that probabilities of the next tokens may differ.")
    ] = 0.005,
    layers: Layers = "",
    dtype: Dtype = "fp32",
    rounds: Annotated[int, typer.Option(min=1, help="Times of each, in turn.")] = 2,
    out: Annotated[
        Path, typer.Option(help="Folder of trials.csv, frontier.svg and profile.json; taken up again.")
    ] = Path("recommend"),
) -> None:
    """Find the method that speeds up the prompts of your model most, on your texts, within a loss limit.

    **sparseflash recommend --model smollm2 --text book.txt --text code.txt --tokens 8192 --max-kl 0.005**

    Each method is tried at several budgets: time of attention against kl of the next tokens (mean over the
    texts). The best one is printed and drawn, and saved as a profile for **sparseflash prefill --profile**
    and for **sparse(model, prefill=Profiled(Profile.load(...)))**. If dense attention is best, that is the
    answer. A stopped run continues where it was.
    """
    from sparseflash.bench import recommend as chooser

    prepared = _prompts(model, text, tokens, dtype, 48)
    given: dict[str, Any] = {"layers": integers(layers) or None, "rounds": rounds, "max_kl": max_kl}
    chooser.run(model, [path.name for path in text], prepared, out, **given)


def calibrate(
    text: Text,
    method: Annotated[
        str,
        typer.Argument(
            help="minference: which pattern each head follows; flexprefill: which tau; moa: which span it "
            "needs; seer-attention: a gate for it; lserve: which KV heads stream; round: the layer that "
            "chooses rounds of a chat."
        ),
    ] = "minference",
    model: Model = "smollm2",
    tokens: Tokens = 4096,
    layers: Layers = "",
    bound: Annotated[
        float, typer.Option(min=0, max=1, help="With moa: most pairs, as a share of causal attention's.")
    ] = 0.5,
    pieces: Annotated[
        int,
        typer.Option(
            min=1,
            help="With seer-attention and lserve: of so many tokens, for gates to learn from; with round: "
            "rounds.",
        ),
    ] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Of the training of gates (lserve: of all).")] = 500,
    target: Annotated[
        str, typer.Option(help="With seer-attention: max, a block's largest weight; sum, its mass.")
    ] = "max",
    decode: Annotated[
        bool, typer.Option(help="With seer-attention: gates for decoded tokens instead of prompts.")
    ] = False,
    alike: Annotated[
        float, typer.Option(min=0, max=1, help="With round: how like the layers above it a layer must be.")
    ] = 0.75,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The profile, by default profile.json (with minference one of this model is gone on with); "
            "with seer-attention the gates, gates.safetensors; with lserve streaming.json."
        ),
    ] = None,
) -> None:
    """Find the pattern, span or gate of every head of a model, and save it.

    **sparseflash calibrate minference --model smollm2 --text book.txt --out smollm2.json**

    minference: each head gets the pattern that recalls most of its dense attention beyond chance.
    flexprefill: each head gets a tau, that is, whether it is query-aware never, always, or by the paper's
    test. moa: each head gets a span, by how much the loss changes without its far pairs, at half of --tokens
    and at all of them. Use the profile: **sparseflash prefill --profile smollm2.json**; in Python
    **sf.methods.Profiled(sf.calibrate.Profile.load("smollm2.json"))**. seer-attention: each layer gets a
    gate, trained to predict attention's blocks from pooled queries and keys: **sparseflash prefill --method
    seer-attention --set gates=gates.safetensors**; with --decode one for decoded tokens
    (**sf.methods.SeerDecode(gates="decode.safetensors")**). lserve: a gate per KV head learns whether distant
    phrases are recalled without its far keys; **sf.methods.streaming_heads("streaming.json")** is the half of
    the heads that can stream. round: the text is cut into --pieces rounds; prints the first layer whose round
    weights are like those of all layers above it.
    """
    from sparseflash.bench import recommend as chooser
    from sparseflash.bench import spans

    if method not in ("minference", "flexprefill", "moa", "seer-attention", "lserve", "round"):
        raise SparseFlashError(
            f"calibrate {method}: expected minference (patterns of heads), flexprefill (taus), moa "
            "(spans), seer-attention (gates), lserve (heads that stream) or round (the layer that chooses)"
        )
    if target not in ("max", "sum"):
        raise SparseFlashError(f"--target {target}: expected max or sum")
    if method == "seer-attention":
        out = Path("decode.safetensors" if decode else "gates.safetensors") if out is None else out
        return _gates(model, text, tokens, pieces, integers(layers) or None, steps, target, out, decode)
    if method == "lserve":
        out = Path("streaming.json") if out is None else out
        return _streaming(model, text, tokens, pieces, steps, out)
    if method == "round":
        return _watershed(_prompts(model, text, tokens - 1, "fp32", 1), pieces, alike)
    out = Path("profile.json") if out is None else out
    if method == "moa":
        [prompt] = _prompts(model, text[:1], tokens - 1, "fp32", 1)
        lengths = (tokens // 2, tokens)
        given: dict[str, Any] = {"bound": bound, "layers": integers(layers) or None, "path": out}
        made = spans.profile(model, prompt.model, prompt.ids, lengths, **given)
        means = (f"{spans.mean(made, n):.0f} of {n}" for n in lengths)
        print(f"{out}: mean spans {', '.join(means)}")
        return
    read = [_read(path) for path in text]
    found = chooser.patterns(model, read, tokens, integers(layers), out, method=method)
    count: dict[str, int] = {}
    for number in found.numbers:
        for head in found.heads(number):
            name = str(head.get("pattern", f"tau {head.get('tau')}"))
            count[name] = count.get(name, 0) + 1
    print(f"{out}: {', '.join(f'{n} heads {name}' for name, n in sorted(count.items()))}")


def _streaming(model: str, text: list[Path], tokens: int, pieces: int, steps: int, out: Path) -> None:
    """Train a gate for each KV head, test halves of the heads on one more piece, and save the gates."""
    import torch
    from rich.progress import Progress

    from sparseflash.bench import streaming
    from sparseflash.common import files
    from sparseflash.integrations.transformers import load

    loaded, tokenizer = load(model)
    read, draw = [_read(path) for path in text], torch.Generator().manual_seed(0)
    made = []
    for n in range(pieces + 1):
        one = read[n % len(read)]
        begin = len(one) // (pieces + 1) * n
        made.append(streaming.planted(tokenizer, one[begin:], tokens, draw))
    ranges = {"sinks": 64, "local": 256}
    with Progress(transient=True) as bar:
        task = bar.add_task("training gates", total=steps)

        def shown(loss: float) -> None:
            bar.update(task, advance=1, description=f"training gates: {loss:.4f}")

        gates = streaming.train(loaded, made[:-1], steps=steps, on_step=shown, **ranges)
    files.write(
        out,
        json.dumps({"model": model, **ranges, "gates": {n: x.tolist() for n, x in gates.items()}}, indent=1)
        + "\n",
    )
    chance = {n: torch.rand(len(x), generator=draw) for n, x in gates.items()}
    near = streaming.near_mass(loaded, made[-1], **ranges)
    halves = {"trained": gates, "most of its mass near": near, "random": chance}
    with torch.no_grad():
        for name, found in halves.items():
            lost = float(streaming.moved(loaded, made[-1], streaming.halved(found), **ranges))
            print(f"half of the heads stream, {name}: answers move by {lost:.4f} of their square")
    print(out)


def _watershed(prompts: list[Any], pieces: int, alike: float) -> None:
    """Find the layer that may choose rounds for those above it, averaged over the texts."""
    from sparseflash.bench import rounds

    if pieces < 4:
        raise SparseFlashError(f"--pieces {pieces}: expected 4 rounds or more")
    each = []
    for prompt in prompts:
        T = prompt.ids.shape[1]
        starts = [n * T // pieces for n in range(pieces)]
        each.append(rounds.likeness(rounds.masses(prompt.model, prompt.ids, starts)))
    mean = {number: sum(one[number] for one in each) / len(each) for number in each[0]}
    print("like the layers above: " + " ".join(f"{number}: {x:.2f}" for number, x in mean.items()))
    found = rounds.watershed(mean, alike)
    print(f"RoundAttention(watershed={found})")


def _gates(
    model: str,
    text: list[Path],
    tokens: int,
    pieces: int,
    layers: list[int] | None,
    steps: int,
    target: Any,
    out: Path,
    decode: bool,
) -> None:
    """Train gates on pieces of the texts, test them on one more piece, and save them."""
    from rich.progress import Progress

    from sparseflash.bench import distill, distill_decode
    from sparseflash.integrations.transformers import load

    read = [_read(path) for path in text]
    loaded, tokenizer = load(model)
    ids = [tokenizer(one, return_tensors="pt").input_ids for one in read]
    cut = [part for one in ids for part in one.split(tokens, 1) if part.shape[1] == tokens]
    if len(cut) < 2:
        raise SparseFlashError(
            f"the texts have {sum(one.shape[1] for one in ids)} tokens: expected two pieces of {tokens} or "
            "more, one to judge by; give longer texts, or fewer --tokens"
        )
    count = min(pieces, len(cut) - 1)
    cut = [cut[n * (len(cut) - 1) // count] for n in range(count)] + cut[-1:]
    with Progress(transient=True) as bar:
        task = bar.add_task("listening", total=len(cut))
        room: Any = distill_decode if decode else distill
        how = {} if decode else {"target": target}
        seen = []
        for one in cut:
            seen.append(room.listen(loaded, one, layers, **how))
            bar.advance(task)
        task = bar.add_task("training", total=len(seen[0]))
        found = room.train(seen[:-1], steps=steps, name=model, on_layer=lambda number: bar.advance(task))
    found.save(out)
    own, equal = room.divergences(found, seen[-1])
    print(
        f"{out}: gates of {len(found.layers)} layers; on text that they did not see they are {own:.3f} nats "
        f"from attention's blocks, equal weights {equal:.3f}"
    )


def _prompts(model: str, text: list[Path], tokens: int, dtype: str, new: int) -> list[Any]:
    """Load the model, and the first tokens of each text."""
    from sparseflash.bench.cases import DTYPES
    from sparseflash.bench.prompts import Prompt
    from sparseflash.integrations.transformers import load

    from .app import dtypes_of

    [kind] = dtypes_of(dtype)
    read = [_read(path) for path in text]
    loaded, tokenizer = load(model, dtype=DTYPES[kind])
    return [Prompt.of(loaded, tokenizer, one, tokens, new) for one in read]


def _read(path: Path) -> str:
    from sparseflash.common.files import no_file

    try:
        if kind := no_file(path):
            raise SparseFlashError(f"--text {path} is {kind}: expected a text file")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SparseFlashError(f"--text {path}: {error.strerror}; expected a text file") from None
