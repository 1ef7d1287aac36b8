"""The board: the same rows whoever measures, controls, and a page that says what they say."""

import pytest
import torch

import sparseflash as sf

pytest.importorskip("transformers")
pytest.importorskip("typer")

import transformers as hf
from typer.testing import CliRunner

from sparseflash.__main__ import app
from sparseflash.bench import board, page, prompts, results, tasks
from transformer_models import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("model")
    size = byte_tokenizer(where)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": size}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**shape, **heads, bos_token_id=None, eos_token_id=None)).eval()
    for name, weight in model.named_parameters():  # sharp attention, so that what is not seen is missed
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 20
    model.save_pretrained(where)
    (where / "one.txt").write_text("So it goes on, and on, and then it ends. " * 100)
    (where / "two.txt").write_text("Another text, of other words, of which there are some. " * 80)
    return where


@pytest.fixture(scope="module")
def model(folder):
    return sf.transformers.load(folder)


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_a_document_has_its_length_and_every_answer_stands_in_it(kind, model, folder):
    _, tokenizer = model
    text = (folder / "one.txt").read_text()
    made = tasks.document(kind, tokenizer, text, 3000)
    assert made.ids.shape == (1, 3000) and len(made.questions) in (4, tasks.QUESTIONS)
    said = tokenizer.decode(made.ids[0])
    for ask, answers in made.questions:
        assert len(answers) == tasks.CHOICES and len({x.shape for x in answers[:1]}) == 1
        for answer in answers:
            assert tokenizer.decode(answer[0]).strip().lower() in said.lower()
        assert tokenizer.decode(ask[0])[:1] == "\n"
    for (_, answers), at in zip(made.questions, made.places):
        assert at == -1 if kind == "words" else True
        line = tokenizer.decode(made.ids[0, at : at + 60])
        assert at < 0 or tokenizer.decode(answers[0][0]).strip() in line
    again, other = (tasks.document(kind, tokenizer, text, 3000, seed=n) for n in (0, 1))
    assert torch.equal(again.ids, made.ids) and not torch.equal(other.ids, made.ids)


def test_planted_lines_end_before_the_last_eighth(model, folder):
    _, tokenizer = model
    made = tasks.document("single", tokenizer, (folder / "one.txt").read_text(), 2000)
    said = tokenizer.decode(made.ids[0])
    assert said.count("The secret number of") == 4
    assert said.rindex("The secret number") < 0.9 * len(said)


def test_scores_are_those_of_whole_forwards(model, folder):
    """Likelihoods of answers over one cache, against a forward of everything for each answer."""
    loaded, tokenizer = model
    made = tasks.document("single", tokenizer, (folder / "one.txt").read_text(), 400)
    found = tasks.score(loaded, made, lambda: sf.transformers.sparse(loaded))
    assert len(found.each) == found.questions and found.right == sum(found.each) / found.questions
    margins = []
    for ask, answers in made.questions:
        logs = []
        for answer in answers:
            ids = torch.cat([made.ids, ask, answer], 1)
            with torch.no_grad():
                said = loaded(ids).logits[0, -answer.shape[1] - 1 : -1].log_softmax(-1)
            logs.append(float(said.gather(1, answer.T).sum()))
        margins.append(logs[0] - max(logs[1:]))
    assert found.margin == pytest.approx(sum(margins) / len(margins), abs=1e-3)
    assert found.right == pytest.approx(sum(x > 0 for x in margins) / len(margins))
    assert found.questions == len(made.questions)


def test_bad_documents_are_refused(model):
    _, tokenizer = model
    with pytest.raises(sf.SparseFlashError, match="kind='riddle': expected one of single, keys"):
        tasks.document("riddle", tokenizer, "text", 100)
    with pytest.raises(sf.SparseFlashError, match="give a longer text"):
        tasks.document("keys", tokenizer, "text " * 30, 4000)


# ---------------------------------------------------------------- cases and controls


@pytest.mark.parametrize("budget", board.BUDGETS)
def test_every_case_keeps_about_its_budget_or_says_by_its_threshold(budget):
    """What is set by a number of keys keeps it to a factor of 2.5, on queries and keys without structure."""
    T = 4096
    made = board.prompts_of(T, budget)
    q, k = torch.randn(2, 1, 2, T, 16, generator=torch.Generator().manual_seed(0))
    free = (
        "xattention",
        "flashprefill",
        "flexprefill",
        "pbs-attn",
        "anchor-attention",
        "dual-chunk-attention",
    )
    free += ("minference", "mtraining")  # of which diagonals, the content says
    for name, method in made.items():
        if name in free:
            continue
        context = {"delta": torch.rand(1, 2, T)} if name == "dynamic-mask" else {}
        plans = method.select(q, k, context).plan
        kept = sum(one.kept for one in (plans if isinstance(plans, tuple) else (plans,)))
        assert 0.4 / budget < kept < 2.5 / budget, (name, budget, kept)


def test_there_are_twenty_five_methods_and_more():
    assert len({*board.prompts_of(4096, 8), *board.caches_of(4096, 8)}) >= 25


def row(case, budget, kept, kl, text="a", phase="prompt"):
    return {
        "phase": phase, "model": "m", "tokens": "64", "text": text, "case": case, "budget": budget,
        "kept": kept, "kl": kl, "method": case,
    }  # fmt: skip


def test_what_beats_the_controls_at_as_many_pairs_is_told_between_their_budgets():
    controls = [
        row(name, n, 1 / n, kl * n) for name, kl in (("sink-window", 0.01), ("random", 0.02)) for n in (2, 8)
    ]
    good, bad = row("good", 4, 0.25, 0.035), row("bad", 4, 0.25, 0.045)
    outside, whole = row("outside", 16, 1 / 16, 0.07), row("whole", 8, 1.0, 0.01)
    said = {x.case: x.beats for x in board.lines([*controls, good, bad, outside, whole])}
    assert said.pop("whole") is None, "what leaves out nothing is no choice"
    # at a quarter, the window loses .04 and the random choice .08: logarithms, halfway
    assert said == {"sink-window": None, "random": None, "good": True, "bad": False, "outside": True}
    assert board.lines([good])[0].beats is None, "without controls nothing is said"


def test_two_texts_are_a_mean_and_their_orders_agree_or_not():
    one = [row(name, 4, 0.2, n / 10) for n, name in enumerate("abcd", 1)]
    same = [row(name, 4, 0.4, n / 20, "b") for n, name in enumerate("abcd", 1)]
    turned = [row(name, 4, 0.4, -n, "b") for n, name in enumerate("abcd", 1)]
    assert board.agreement([*one, *same], "prompt", "m", 64) == pytest.approx(1)
    assert board.agreement([*one, *turned], "prompt", "m", 64) == pytest.approx(-1)
    assert board.agreement(one, "prompt", "m", 64) is None
    found = board.lines([*one, *same])[0]
    assert found.texts == 2 and found.figures["kept"] == pytest.approx(0.3)


# ---------------------------------------------------------------- the whole


def test_a_board_is_measured_taken_up_again_and_written_as_a_page(model, folder, tmp_path):
    out = tmp_path / "board"
    command = [
        "board", "--model", str(folder), "--text", str(folder / "one.txt"), "--text", str(folder / "two.txt"),
        "--lengths", "384", "--budgets", "8", "--out", str(out), "--tasks", "single",
        "--methods", "block-topk,snapkv,quest",
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = results.read(out / "board.csv")
    keys = [board.key(x) for x in rows]
    assert len(set(keys)) == len(keys)
    cases = {(x["phase"], x["case"], x["budget"], x["text"]) for x in rows}
    for text in ("one", "two"):
        assert {("prompt", x, "8", text) for x in ("block-topk", "random", "sink-window")} <= cases
        assert {("decode", x, "8", text) for x in ("snapkv", "quest", "streaming-llm")} <= cases
    assert ("task", "dense", "1", "single") in cases and ("task", "random", "8", "single") in cases
    for x in rows:
        if x["phase"] != "task" and x["case"] != "dense":
            assert float(x["kl"]) > 0 and 0 < float(x["kept"]) <= 1, x
    dense = next(x for x in rows if x["case"] == "dense")
    assert float(dense["kl"]) == 0

    before = (out / "board.csv").read_bytes()
    again = CliRunner().invoke(app, [*command, "--minutes", "5"])
    assert again.exit_code == 0 and (out / "board.csv").read_bytes() == before, "nothing is measured twice"
    text = {"one": (folder / "one.txt").read_text()[3:]}
    other = board.Board(folder.name, *model, text, tokens=[384], budgets=[8], wanted=["block-topk"], skip=3)
    assert next(other.measure(rows))["skip"] == 3, "another place of a text is measured"

    said = (out / "board.html").read_text()
    assert said.count("<table") >= 2 and "Prompts" in said and "Caches and decoding" in said
    assert "http" not in said.replace("http://www.w3.org", ""), "nothing from elsewhere"
    for name in ("block-topk", "snapkv", "quest"):
        assert name in said


def test_figures_of_a_prompt_are_those_of_losses(model, folder):
    loaded, tokenizer = model
    text = (folder / "one.txt").read_text()
    made = board.Board("m", loaded, tokenizer, {"one": text}, (512,), (8,), ("block-topk",))
    got = next(x for x in made.measure() if x["case"] == "block-topk")
    prompt = prompts.Prompt.of(loaded, tokenizer, text, 512, board.NEW)
    want = list(prompts.losses(prompt, {"x": board.prompts_of(512, 8)["block-topk"]}))[1]
    for name in ("kept", "recall", "loss", "kl"):
        assert got[name] == pytest.approx(want[name], rel=1e-5)


def test_names_that_do_not_exist_are_refused():
    for given, said in (
        ({"budgets": (3,)}, "expected some of 2, 4, 8, 16"),
        ({"wanted": ("magic",)}, "no such methods: magic; there are adakv"),
        ({"asked": ("riddle",)}, "no such tasks: riddle; there are single"),
    ):
        with pytest.raises(sf.SparseFlashError, match=said):
            board.Board("m", None, None, {}, **given)


def test_questions_that_random_keys_answer_as_well_are_left_out():
    def asked(case, kind, right):
        return row(case, 8, "", "", kind, "task") | {"right": right, "questions": 16}

    rows = [asked(*x) for x in (("dense", "keys", 0.9), ("random", "keys", 0.3), ("dense", "values", 0.3))]
    rows += [asked("random", "values", 0.25), asked("snap", "keys", 0.8), asked("snap", "values", 1.0)]
    said = page.render(rows)
    assert "Left out, since random keys answer them as well as dense attention: values" in said
    assert ">80%<" in said and ">100%<" not in said
