"""`make compare`: two trees timed in turn, and what the times of three sides say."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparseflash.bench.timing import Timing
from sparseflash.common.errors import SparseFlashError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="benchmarks/ is not here")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def measured(*sets):
    """A case of which each set holds the rounds of old, new, and new again."""
    from benchmarks.compare.pairs import SIDES, Case

    case = Case("a case")
    for rounds in sets:
        for side, times in zip(SIDES, zip(*rounds), strict=True):
            case.times[side].append(Timing(times[0], list(times)))
    return case


def test_the_ratio_is_that_of_rounds_and_not_of_medians():
    """The machine is twice as slow in the second round, for all."""
    assert measured([(1, 2, 2), (2, 4, 4), (1, 2, 2)]).ratio == pytest.approx(2)
    assert measured([(1, 2, 2)], [(1, 3, 3)], [(1, 9, 9)]).ratio == pytest.approx(3)


def test_both_processes_of_the_new_tree_have_their_say():
    assert measured([(1, 1, 4)]).ratio == pytest.approx(2)


def test_the_spread_is_the_worst_difference_of_a_tree_from_itself_whichever_is_faster():
    assert measured([(1, 2, 2)]).spread == pytest.approx(1)
    assert measured([(1, 1, 1.1)], [(1, 1.3, 1)], [(1, 1, 1)]).spread == pytest.approx(1.3)


def test_slower_is_beyond_the_limit_and_beyond_the_spread():
    case = measured([(1, 1.1, 1.1)])
    assert case.slower(1.03) and not case.slower(1.2)
    assert not measured([(1, 1.0, 1.2)]).slower(1.03)  # 1.095, and from itself 1.2
    case.missing = "the old tree cannot run it"
    assert not case.slower(1.03)


def test_no_side_has_a_place_of_its_own():
    from benchmarks.compare.pairs import SIDES, turns

    orders = list(turns(6))
    assert len(set(orders)) == 6
    for side in SIDES:
        assert [order.index(side) for order in orders].count(0) == 2


def test_a_line_names_the_ratio_the_spread_and_what_is_missing():
    from benchmarks.compare.__main__ import lines

    gone = measured()
    gone.missing = "the old tree cannot run it (AttributeError: decode)"
    said = lines([measured([(1, 1.1, 1.1)]), gone], 1.03)
    assert "1.100   1.000  SLOWER" in said[1]
    assert said[2].endswith("skipped: the old tree cannot run it (AttributeError: decode)")


class Answers:
    """A worker that answers what it is told to."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def measure(self, name, seconds):
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_what_the_old_tree_lacks_is_skipped_and_what_neither_has_is_an_error():
    from benchmarks.compare.pairs import SIDES, Case, _measure

    no, yes = {"error": "AttributeError: decode"}, {"ms": 1.0}
    case = Case("a case")
    _measure(case, dict(zip(SIDES, (Answers(no), Answers(yes), Answers(yes)), strict=True)), 2, 0.0)
    assert "AttributeError: decode" in case.missing and not case.times["new"]
    with pytest.raises(SparseFlashError, match="this tree cannot run it"):
        _measure(case, dict(zip(SIDES, (Answers(no),) * 3, strict=True)), 2, 0.0)


def test_the_first_round_warms_up():
    from benchmarks.compare.pairs import SIDES, Case, _measure

    case = Case("a case")
    workers = {side: Answers({"ms": 9.0}, {"ms": 1.0}, {"ms": 1.0}) for side in SIDES}
    _measure(case, workers, 2, 0.0)
    assert [x.times for x in case.times["old"]] == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no OLD"),
        (["HEAD", "--only", "nothing of that"], "no case has that in its name"),
        (["HEAD", "--limit", "0"], "number above 0"),
        (["HEAD", "--rounds", "none"], "number above 0"),
    ],
)
def test_options_that_say_nothing_are_refused(arguments, said, capsys):
    from benchmarks.compare.__main__ import options

    with pytest.raises(SystemExit, match="2"):
        options(arguments)
    assert said in capsys.readouterr().err


def test_a_commit_that_is_not_there_is_refused_with_its_name():
    from benchmarks.compare.trees import commit_of

    for name in ("no-such-branch", "--help", ""):
        with pytest.raises(SparseFlashError, match="there is no such commit"):
            commit_of(name)


@pytest.mark.slow
def test_this_tree_beside_its_last_commit():
    """Small and short: every case runs, and every line has its figures."""
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("this is no clone: there is no older tree")
    options = ["--small", "8", "--sets", "1", "--rounds", "1", "--seconds", "0.001", "--limit", "1000"]
    command = [sys.executable, "-m", "benchmarks.compare", "HEAD", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "set 1 of 1" in done.stderr
    from benchmarks.compare.worker import CASES

    wide = max(map(len, CASES))
    found = {row[:wide].strip(): row[wide:] for row in done.stdout.splitlines()}
    for name in CASES:
        if "skipped" not in found[name]:
            assert all(float(x) > 0 for x in found[name].split()[:4])
