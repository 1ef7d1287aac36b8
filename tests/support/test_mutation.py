"""The run that makes faults makes them, and judges the tests by them (`python tests/mutation.py`)."""

import subprocess
import sys

import pytest

import mutation
from sparseflash.plan import options


def test_a_fault_is_other_code_in_the_same_function():
    before = options.multiple.__code__
    fault = next(
        x
        for x in mutation.faults("plan")
        if (x.module, x.function) == ("plan/options.py", "multiple") and x.said.startswith("n == 0")
    )
    assert options.multiple(2, 3) == 6
    try:
        assert mutation.put(fault, mutation.broken(fault))
        assert options.multiple(2, 3) != 6 or options.multiple(1, 1) != 1 or options.multiple(4, 2) != 4
    except ZeroDivisionError:
        pass  # as good a difference
    finally:
        options.multiple.__code__ = before
    assert options.multiple(2, 3) == 6


def test_a_sample_is_the_same_for_a_seed_and_of_functions_that_differ():
    one, two, other = (mutation.sample(12, seed) for seed in (5, 5, 6))
    assert one == two != other
    assert len({(x.module, x.function) for x in one}) == len(one) == 12
    assert {x.module.split("/")[0] for x in one} == {"plan", "methods", "integrations"}


def test_a_sample_of_one_module_is_of_nothing_else():
    drawn = mutation.sample(30, 5, "plan/algebra.py")
    assert {x.module for x in drawn} == {"plan/algebra.py"} and len(set(drawn)) == 30
    assert {x.module.split("/")[0] for x in mutation.sample(6, 5, "methods")} == {"methods"}


def test_faults_that_are_none_can_be_made_and_have_a_reason():
    every = {fault.key for area in mutation.AREAS for fault in mutation.faults(area)}
    assert sorted(mutation.equal() - every) == []
    assert all(len(row.split(",")[-1]) > 10 for row in mutation.EQUAL.read_text().splitlines()[1:])


@pytest.mark.parametrize("works", [True, False])
def test_a_fork_answers_or_is_ended(works):
    def work():
        while not works:
            pass
        return [1, 2]

    assert mutation.forked(work, 20.0 if works else 0.5) == ([1, 2] if works else None)


@pytest.mark.slow
def test_nineteen_of_twenty_faults_are_caught(tmp_path):
    """Of a sample that changes where the library does; `python tests/mutation.py` takes another seed."""
    out = tmp_path / "faults.csv"
    how = [sys.executable, mutation.__file__, "--sample", "45", "--seed", "70411", "--out", str(out)]
    done = subprocess.run(how, capture_output=True, text=True)
    survivors = [line for line in done.stdout.splitlines() if line.startswith("SURVIVED")]
    print(done.stdout.splitlines()[-1])
    assert done.returncode == 0, "\n".join([*survivors, done.stderr[-2000:]])
