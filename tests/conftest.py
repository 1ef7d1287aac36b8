"""Shared by all tests: seeds, threads, the data that only some machines have, and a one-line reproducer."""

import collections
import os
import random
import signal
import threading
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

from cases import CASES

REPO = Path(__file__).resolve().parent.parent
SEED = int(os.environ.get("SPARSEFLASH_SEED", "0"))

# the same examples on every machine; with another seed others, each time
hypothesis.settings.register_profile("sparseflash", deadline=None, print_blob=True, derandomize=SEED == 0)
hypothesis.settings.load_profile("sparseflash")


def pytest_configure(config):
    """One thread for each worker of pytest-xdist, two without; what needs threads sets them itself."""
    if threading.current_thread() is threading.main_thread():
        # a job started in the background may ignore Ctrl-C, and its children then too; the tests send it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items):
    """A GPU test that was asked for on a machine without a GPU says so instead of failing."""
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="torch sees no CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


SHARE = 60.0
"""Seconds of one core that a file of tests may take in `make test`, on the two cores it is made for."""
SHARES = {"test_methods.py": 5.0 * len(CASES), "test_triton.py": 240.0, "test_distributed.py": 90.0}
"""Files that may take more: five seconds for each method, and all of Triton's kernels in its interpreter; and
what starts four processes."""
_spent: dict[str, float] = collections.Counter()


def pytest_runtest_logreport(report):
    """Add up what each file takes, wherever its tests run."""
    _spent[Path(report.fspath).name] += report.duration


def pytest_terminal_summary(terminalreporter):
    """`make test` fails where a file takes more than its share: what is long belongs to the slow tests."""
    limit = float(os.environ.get("SPARSEFLASH_SHARES", "0"))
    for name, seconds in sorted(_spent.items()):
        share = SHARES.get(name, SHARE) * limit
        if limit and seconds > share:
            terminalreporter.write_line(f"{name} took {seconds:.0f} s, its share is {share:.0f} s", red=True)
            terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure prints the line that runs it again, seed included."""
    report = yield
    if report.failed:
        marked = [f"-m {name} " for name in ("slow", "gpu") if item.get_closest_marker(name)][-1:]
        again = f"SPARSEFLASH_SEED={SEED} python -m pytest {''.join(marked)}'{item.nodeid}'"
        report.sections.append(("run this one again", again))
    return report


@pytest.fixture
def seed(request) -> int:
    """A seed of the test's own, the same in every run, order and folder; SPARSEFLASH_SEED shifts them all."""
    return zlib.crc32(f"{SEED}:tests/{request.node.nodeid.rpartition('/')[2]}".encode())


@pytest.fixture
def generator(seed) -> torch.Generator:
    """A CPU generator seeded for this test alone."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _global_seeds(seed):
    """Code under test that draws from the global generators draws the same in every run."""
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def books() -> list[Path]:
    """Plain-text books for tests on real text; a machine without them skips, and says where they would be.

    They are looked for in ``$SPARSEFLASH_DATA/books`` and in ``../shared/data/books`` beside the repository.
    """
    given = os.environ.get("SPARSEFLASH_DATA")
    folder = (Path(given) if given else REPO.parent / "shared" / "data") / "books"
    found = sorted(folder.glob("*.txt"))
    if not found:
        pytest.skip("no books: put text files in a folder books/ and name its parent in SPARSEFLASH_DATA")
    return found
