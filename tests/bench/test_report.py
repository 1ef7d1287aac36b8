"""The demo's report: complete, self-contained, and true to its figures."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

pytest.importorskip("safetensors")

from sparseflash.bench import chart
from sparseflash.bench.report import Drawing, Result, Run, comparison, render, verdict, write
from sparseflash.common.errors import SparseFlashError
from sparseflash.train import Row


def steps(ms, bpb, count=6):
    return [
        Row(i + 1, 5.0 - i / 10, bpb + (count - 1 - i) / 10 if i % 2 else None, ms, 0.0) for i in range(count)
    ]


def result(**changes):
    runs = [
        Run("dense", "all earlier keys", "dense", steps(400.0, 4.0)),
        Run("hash & <local>", "buckets", "hash-2", steps(160.0, 4.1)),
    ]
    curves = [
        {
            "case": case,
            "family": case,
            "T": t,
            "ms": ms * t / 1024,
            "speedup": 1.0,
            "density": 0.5,
            "note": "",
        }
        for case, ms in (("dense (torch SDPA)", 8.0), ("hash-sparse, 16 buckets", 2.0))
        for t in (1024, 2048)
    ]
    curves.append(
        {"case": "reformer", "family": "reformer", "T": 2048, "note": "skipped: 9.0 s predicted, 3 s left"}
    )
    fields = {
        "machine": {"cpu": "a processor", "git": ""},
        "data": "some text",
        "length": 8192,
        "dtype": "fp32",
        "parameters": 3_300_000,
        "runs": runs,
        "curves": curves,
        "drawings": [Drawing("head 1", [[True, False], [True, True]], "Plan()")],
        "command": "sparseflash demo",
        "letters": 4.6,
        "notes": ["one note"],
    }
    return Result(**{**fields, **changes})


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere():
    text = render(result())
    page = Page(text)
    assert page.open == []
    assert page.addresses == []
    assert "@import" not in text and "url(" not in text and "<script" not in text
    assert "$" not in "".join(page.words)  # every placeholder is filled


def test_the_table_shows_what_was_measured():
    base, sparse = comparison(result())
    assert base["speedup"] == 1.0
    assert sparse["speedup"] == pytest.approx(2.5)
    assert sparse["tokens_per_s"] == pytest.approx(8192 / 0.160)
    assert sparse["worse"] == pytest.approx(0.025)
    words = " ".join(Page(render(result())).words)
    for figure in (
        "2.50x",
        "160",
        "51,200",
        "4.1000",
        "+2.5%",
        "skipped: 9.0 s predicted",
        "one note",
        "a processor",
    ):
        assert figure in words


def test_labels_are_escaped():
    assert "hash &amp; &lt;local&gt;" in render(result())
    assert "<local>" not in render(result())


@pytest.mark.parametrize(
    "ms, bpb, words",
    [
        (160.0, 4.1, ("2.50 times as fast as", "2.5% worse")),
        (800.0, 3.9, ("slower than", "2.5% better")),
        (200.0, 4.001, ("2.00 times as fast as", "the same within half a percent")),
    ],
)
def test_the_verdict_says_what_happened_whatever_it_is(ms, bpb, words):
    outcome = result()
    outcome.runs[1].rows = steps(ms, bpb)
    for word in words:
        assert word in verdict(outcome)


@pytest.mark.parametrize("letters, learned", [(4.6, True), (4.2, False)])
def test_a_run_too_short_to_learn_says_so_first_and_offers_what_is_long_enough(letters, learned):
    outcome = result(
        letters=letters, command="sparseflash demo --minutes 0.5 --length 8192 --out x", length=2048
    )
    said = verdict(outcome)
    assert said.startswith("Too short to learn: ") is not learned
    assert ("says nothing of quality yet" in said) is not learned
    # 100 steps of 400 and of 160 ms are 56 s, three quarters of the box
    assert ("`sparseflash demo --out x --length 2048 --minutes 3`" in said) is not learned


def test_an_unwritable_report_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SparseFlashError, match="cannot write the report"):
        write(result(), tmp_path / "file" / "report.html")


def svg(text):
    return ET.fromstring(text)


@pytest.mark.parametrize("log", [False, True])
def test_points_stay_inside_the_chart_and_keep_their_order(log):
    line = chart.Line("a", [(1024, 3.0), (2048, 9.0), (4096, 400.0)], "dense")
    circles = svg(chart.lines([line], x_label="x", y_label="y", log=log)).findall(".//circle")
    xs = [float(c.get("cx")) for c in circles]
    ys = [float(c.get("cy")) for c in circles]
    assert len(circles) == 3
    assert xs == sorted(xs) and ys == sorted(ys, reverse=True)
    assert all(chart.LEFT <= x <= chart.WIDTH - chart.RIGHT for x in xs)
    assert all(chart.TOP <= y <= chart.HEIGHT - chart.BOTTOM for y in ys)


def test_labels_of_equal_lines_do_not_overlap():
    lines = [chart.Line(f"line {i}", [(0, 1.0), (1, 1.0 + i * 1e-6)], "dense") for i in range(8)]
    drawn = svg(chart.lines(lines, x_label="x", y_label="y"))
    at = sorted(float(t.get("y")) for t in drawn.findall(".//g/text"))
    assert len(at) == 8
    assert min(b - a for a, b in zip(at, at[1:])) >= 15.9
    assert at[-1] <= chart.HEIGHT


def test_the_names_of_bars_have_room_and_bars_too():
    label = "half dropped on both sides, forward + backward, bf16"
    drawn = svg(chart.bars([(label, 2.0), ("dense", 1.0)], x_label="times"))
    at = next(float(t.get("x")) for t in drawn.iter("text") if t.text == label)
    assert at >= 7.5 * len(label)  # letters of 14 px, ending there
    assert [float(b.get("width")) > 100 for b in drawn.iter("rect")] == [True, True]


def test_a_narrow_page_scrolls_its_charts_and_shows_that_it_does():
    """At 390 px a chart would be drawn at less than half its size: letters of 6 px."""
    style = re.search(r"<style>(.*?)</style>", render(result()), re.DOTALL)[1]
    least = float(re.search(r"\.chart {[^}]*min-width: ([\d.]+)rem", style)[1]) * 16
    letters = float(re.search(r"\.chart {[^}]*font: (\d+)px", style)[1])
    assert letters * least / chart.WIDTH >= 11
    assert re.search(r"\.scroll, figure {[^}]*overflow-x: auto;[^}]*\blocal\b", style)


def test_one_point_and_no_points_are_drawn_too():
    svg(chart.lines([chart.Line("a", [(1, 2.0)], "dense")], x_label="x", y_label="y", log=True))
    assert "Nothing was measured" in chart.lines([chart.Line("a", [], "dense")], x_label="x", y_label="y")


def test_a_mask_covers_exactly_its_visible_pairs():
    keep = [[True, False, True, True], [False] * 4, [True] * 4]
    path = svg(chart.mask(keep, "m")).find("path").get("d")
    cells = set()
    for run in path.split("z")[:-1]:
        start, length = run[1:].split("v")[0].split("h")
        x, y = map(int, start.split())
        cells |= {(y, x + i) for i in range(int(length))}
    assert cells == {(y, x) for y, row in enumerate(keep) for x, seen in enumerate(row) if seen}
