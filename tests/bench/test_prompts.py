"""Long prompts of a model: what a method brings and loses there, which to take, what heads follow."""

import json
from pathlib import Path

import pytest
import torch

import sparseflash as sf

pytest.importorskip("transformers")
pytest.importorskip("typer")

import transformers as hf
from typer.testing import CliRunner

from sparseflash.__main__ import app
from sparseflash.bench import capture, prompts, recommend, results, session
from sparseflash.bench.timing import Timing
from sparseflash.selection.calibrate import Profile
from transformer_models import byte_tokenizer

WINDOW = sf.methods.SinkWindow(window=24)
FULL = sf.methods.SinkWindow(window=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer of bytes, as `from_pretrained` reads it."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("model")
    size = byte_tokenizer(where)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": size}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 400}
    config = hf.LlamaConfig(**shape, **heads, bos_token_id=None, eos_token_id=None)
    model = hf.LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():  # sharp attention, so that what is not seen is missed
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 20
    model.save_pretrained(where)
    (where / "text.txt").write_text("So it goes on, and on, and then it ends. " * 20)
    return where


@pytest.fixture(scope="module")
def prompt(folder):
    return prompts.Prompt.of(*sf.transformers.load(folder), (folder / "text.txt").read_text(), 300, 16)


def test_what_is_lost_is_what_whole_forwards_say(prompt):
    """Loss and divergence, of logits that are never there at once, against those of one forward each."""
    rows = {row["case"]: row for row in prompts.losses(prompt, {"window": WINDOW, "full": FULL})}
    model, ids = prompt.model, prompt.ids
    with torch.no_grad():
        want = {"dense": model(ids).logits}
        for name, method in (("window", WINDOW), ("full", FULL)):
            with sf.transformers.sparse(model, prefill=method):
                cache = model(ids[:, :300], use_cache=True)
            behind = model(ids[:, 300:], past_key_values=cache.past_key_values)
            want[name] = torch.cat([cache.logits, behind.logits], 1)
    for name, logits in want.items():
        loss = torch.nn.functional.cross_entropy(logits[0, :299], ids[0, 1:300])
        own, other = (want[x][0, 299:315].log_softmax(-1) for x in ("dense", name))
        kl = torch.nn.functional.kl_div(other, own, log_target=True, reduction="batchmean")
        assert rows[name]["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert rows[name]["kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    assert rows["full"]["kl"] < 1e-6 < rows["window"]["kl"]
    assert rows["full"]["kept"] == pytest.approx(1) and rows["full"]["recall"] == pytest.approx(1)
    assert rows["window"]["kept"] < 0.2 and rows["window"]["recall"] < 0.9


def test_all_cases_are_timed_in_turn_and_measured(prompt):
    rows = list(prompts.measure(prompt, {"window": WINDOW}, rounds=2))
    assert [row["case"] for row in rows] == ["sdpa", "dense", "window"]
    assert all(row["ms"] > 0 and row["gain"] > 0 and row["rounds"] == 2 for row in rows)
    assert rows[1]["gain"] == 1 and "kl" not in rows[0] and rows[2]["kl"] > 0
    assert prompt.model.config._attn_implementation == "sdpa"


def test_texts_and_models_that_are_too_short_are_refused(folder):
    model, tokenizer = sf.transformers.load(folder)
    with pytest.raises(sf.SparseFlashError, match="the text has 5 tokens; 300 of a prompt and 48 behind"):
        prompts.Prompt.of(model, tokenizer, "short", 300)
    with pytest.raises(sf.SparseFlashError, match="the model knows 400 positions; ask for at most 352"):
        prompts.Prompt.of(model, tokenizer, "long " * 200, 380)


# ---------------------------------------------------------------- which to take


TRIED = {
    "narrow": {"method": "sink-window", "window": 8},
    "wide": {"method": "sink-window", "window": 512},
    "wider": {"method": "sink-window", "window": 600},
}


def chosen(prompt, out, monkeypatch, gains, **more):
    """What is recommended where times are as given, and which cases were timed."""
    timed = []

    def times(prompt, cases, **_):
        timed.extend(cases)
        return {name: Timing(1.0, [1 / gains.get(name, 1.0)]) for name in ("dense", *cases)}

    monkeypatch.setattr(recommend, "times", times)
    return recommend.run("tiny", ["a"], [prompt], out, tried=TRIED, **more), timed


def test_the_fastest_that_loses_little_is_taken_and_written(prompt, tmp_path, monkeypatch, capsys):
    found, timed = chosen(
        prompt, tmp_path, monkeypatch, {"narrow": 9.0, "wide": 1.5, "wider": 2.0}, max_kl=1e-4
    )
    assert sorted(timed) == ["wide", "wider"]  # what loses too much is not worth a time
    assert found.heads(0) == [TRIED["wider"]] * 4 == Profile.load(tmp_path / "profile.json").heads(7)
    assert "wider: 2.00x to the first token" in capsys.readouterr().out
    assert {row["case"] for row in results.read(tmp_path / "trials.csv")} == set(TRIED)


@pytest.mark.parametrize(("gains", "least"), [({"wide": 1.01}, 1e-4), ({"wide": 5.0}, -1.0)])
def test_where_nothing_pays_dense_attention_is_recommended(
    prompt, tmp_path, monkeypatch, capsys, gains, least
):
    found, _ = chosen(prompt, tmp_path, monkeypatch, gains, max_kl=least)
    assert found is None and "dense attention is best for 300 tokens of tiny" in capsys.readouterr().out
    assert not (tmp_path / "profile.json").exists()


def test_a_stopped_run_goes_on_where_it_was(prompt, tmp_path, monkeypatch):
    asked = []

    def losses(prompt, cases, **more):
        asked.append(list(cases))
        for row in prompts.losses(prompt, cases, **more):
            if row["case"] == "wider" and len(asked) == 1:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(recommend, "losses", losses)
    with pytest.raises(KeyboardInterrupt):
        chosen(prompt, tmp_path, monkeypatch, {}, max_kl=1e-4)
    chosen(prompt, tmp_path, monkeypatch, {}, max_kl=1e-4)
    assert asked == [["narrow", "wide", "wider"], ["wider"]]


def test_what_one_text_rules_out_is_not_tried_on_another(prompt, tmp_path, monkeypatch):
    monkeypatch.setattr(
        recommend, "times", lambda prompt, cases, **_: {x: Timing(1.0, [1.0]) for x in ("dense", *cases)}
    )
    recommend.run("tiny", ["a", "b"], [prompt, prompt], tmp_path, tried=TRIED, max_kl=1e-4)
    tried = [(row["text"], row["case"]) for row in results.read(tmp_path / "trials.csv")]
    assert tried == [("a", "narrow"), ("a", "wide"), ("a", "wider"), ("b", "wide"), ("b", "wider")]
    assert list(tmp_path.glob("trials-300-*frontier.svg"))


@pytest.mark.slow
def test_for_short_prompts_of_a_real_model_dense_attention_is_best(tmp_path, capsys):
    """At 512 tokens selection costs more than it saves, or what it saves is lost in the rest of the model."""
    try:
        model, tokenizer = sf.transformers.load("smollm2")
    except sf.SparseFlashError as error:
        pytest.skip(str(error))
    text = "\n".join(path.read_text() for path in sorted(Path(sf.__file__).parent.glob("*.py")))
    prompt = prompts.Prompt.of(model, tokenizer, text, 512)
    found = recommend.run("smollm2", ["the source"], [prompt], tmp_path)
    assert found is None and "dense attention is best for 512 tokens" in capsys.readouterr().out


def test_candidates_are_methods_and_grow_with_the_prompt():
    for tokens in (64, 8192, 1 << 20):
        tried = recommend.candidates(tokens)
        assert len(tried) >= 12 and all(recommend._method(setting) for setting in tried.values())
    widths = [recommend.candidates(n)["sink-window window=" + str(n // 8)] for n in (1024, 8192)]
    assert [x["window"] for x in widths] == [128, 1024]


def test_each_head_gets_the_pattern_that_finds_most_beyond_chance(folder, tmp_path):
    text = (folder / "text.txt").read_text()
    found = recommend.patterns(str(folder), [text], 300, [], tmp_path / "p.json", progress=False)
    assert found.numbers == (0, 1) and len(found.heads(0)) == 4
    tensors, _ = capture.of_model(str(folder), text, 300)
    shape = {"method": "minference", "pattern": "a-shape", "vertical": 16, "slash": 50}
    past = torch.ones(300, 300, dtype=torch.bool).tril()
    for number in (0, 1):
        q, k = (tensors[f"layer.{number}.{x}"] for x in "qk")
        weights = (q @ k.repeat_interleave(2, 1).mT / q.shape[-1] ** 0.5).masked_fill(~past, -torch.inf)
        want = {}
        for setting in (*found.heads(number), shape):
            mask = recommend._method(setting).select(q, k).plan.to_dense().expand(1, 4, -1, -1)
            seen = (weights.softmax(-1) * mask).sum((2, 3))[0] / 300
            want[json.dumps(setting)] = seen - mask.sum((2, 3))[0] / past.sum()
            got = recommend._beyond_chance(setting, q, k)
            torch.testing.assert_close(got, want[json.dumps(setting)], atol=1e-4, rtol=0)
        for head, setting in enumerate(found.heads(number)):
            assert want[json.dumps(setting)][head] >= want[json.dumps(shape)][head] - 1e-4


def test_each_head_gets_the_tau_that_finds_most_beyond_chance(folder, tmp_path):
    text = (folder / "text.txt").read_text()
    given = {"method": "flexprefill", "progress": False}
    found = recommend.patterns(str(folder), [text], 300, [1], tmp_path / "p.json", **given)
    tensors, _ = capture.of_model(str(folder), text, 300)
    q, k = (tensors[f"layer.1.{x}"] for x in "qk")
    taus, one = (0.1, 0.0, 1.0), found.heads(1)[0]
    best = torch.stack([recommend._beyond_chance({**one, "tau": tau}, q, k) for tau in taus]).argmax(0)
    assert [x["tau"] for x in found.heads(1)] == [taus[n] for n in best.tolist()]


# ---------------------------------------------------------------- commands


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_commands_measure_choose_and_calibrate(folder, tmp_path, monkeypatch):
    text, model = folder / "text.txt", ("--model", folder, "--text", folder / "text.txt", "--tokens", 200)
    done = run("calibrate", "minference", *model, "--out", tmp_path / "p.json")
    assert "8 heads" in done.output or done.output.count("heads") > 1
    done = run("calibrate", "moa", *model, "--bound", 1, "--out", tmp_path / "moa.json")
    assert "mean spans" in done.output and len(Profile.load(tmp_path / "moa.json").heads(1)) == 4
    done = run(
        "prefill", *model, "--profile", tmp_path / "p.json", "--rounds", 1, "--out", tmp_path / "a.csv"
    )
    rows = results.read(tmp_path / "a.csv")
    assert [row["case"] for row in rows] == ["sdpa", "dense", "profile p.json"] and text.exists()
    monkeypatch.setattr(recommend, "candidates", lambda tokens: TRIED)
    done = run("recommend", *model, "--out", tmp_path / "r", "--rounds", 1, "--max-kl", 1e-4)
    assert "for 200 tokens" in done.output or "to the first token" in done.output
    assert (tmp_path / "r" / "trials.csv").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prefill", "--text", "/nowhere"), "/nowhere: No such file or directory; expected a text file"),
        (("prefill", "--text", "."), "is a directory: expected a text file"),
        (("prefill", "--text", "x", "--profile", "p", "--set", "a=1"), "give one of them"),
        (("calibrate", "xattention", "--text", "x"), "expected minference"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_read(words, said):
    with pytest.raises(sf.SparseFlashError, match=said):
        run(*words)


# ---------------------------------------------------------------- fewer tokens, and what methods say


@torch.no_grad()
def test_a_prompt_read_in_part_is_judged_by_what_follows(prompt):
    how = sf.transformers.SpecPrefill(keep=0.3, chunk=16, last=16)
    whole = sf.transformers.SpecPrefill(keep=1)
    rows = {row["case"]: row for row in prompts.measure(prompt, {"part": how, "all": whole}, rounds=1)}
    assert rows["part"]["read"] == (5 * 16 + 12) / 300 and rows["all"]["read"] == 1
    assert rows["all"]["kl"] == 0 < rows["part"]["kl"] and rows["part"]["ms"] > 0
    assert "loss" not in rows["part"] and "kept" not in rows["part"]
    model, ids = prompt.model, prompt.ids
    with sf.transformers.sparse(model, tokens=how):
        first = model(ids[:, :300])
    last = model(ids[:, 300:-1], past_key_values=first.past_key_values)
    got = torch.cat([first.logits[0, -1:], last.logits[0]]).log_softmax(-1)
    want = model(ids).logits[0, 299:-1].log_softmax(-1)
    assert rows["part"]["kl"] == pytest.approx(prompts.divergence(want, got), rel=1e-3)


def test_spec_prefill_stands_beside_controls_that_judge_nothing(folder, tmp_path):
    given = ("--model", folder, "--text", folder / "text.txt", "--tokens", 200, "--rounds", 0)
    settings = ("--set", "keep=0.5", "--set", "chunk=16", "--set", f"draft={folder}")
    done = run("prefill", *given, "--method", "spec-prefill", *settings, "--out", tmp_path / "s.csv")
    rows = results.read(tmp_path / "s.csv", "read")
    names = ["dense", "spec-prefill", "random tokens", "first and last tokens"]
    assert [row["case"] for row in rows] == names
    assert len({row["read"] for row in rows[1:]}) == 1 and "random tokens" in done.output
    for words, said in (
        (("--set", "kepp=1"), "no hyper-parameter 'kepp'"),
        (("--last-dense", 8), "reads fewer tokens in all layers"),
    ):
        with pytest.raises(sf.SparseFlashError, match=said):
            run("prefill", *given, "--method", "spec-prefill", *words, "--out", tmp_path / "x.csv")


def test_rows_say_how_many_heads_are_query_aware_and_that_nothing_was_left_out(prompt, tmp_path):
    def flex(tau):
        return sf.methods.FlexPrefill(0.9, tau, 32, 32)

    cases = {
        "never": flex(0.0),
        "always": flex(0.84),
        "half": sf.methods.LastDense(flex((0.84, 0.84, 0.0, 0.0)), rows=16),
        "window": sf.methods.SinkWindow(window=24),
        "full": FULL,
    }
    rows = {row["case"]: row for row in prompts.losses(prompt, cases)}
    assert [rows[case].get("aware") for case in cases] == [0, 1, 0.5, None, None]
    assert [bool(rows[case].get("note")) for case in cases] == [False, False, False, False, True]
    out = session.session("x", tmp_path / "x.csv", lambda on_run: rows.values(), ("case", "aware", "note"))
    assert len(out) == 6
