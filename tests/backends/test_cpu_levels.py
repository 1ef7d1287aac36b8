"""Every instruction-set level of the native backend against fp64; other compilers, other processors."""

import functools
import os
import shutil
from dataclasses import replace

import pytest
import torch

import cpu_cases
import cpu_remote
import test_decode
import test_dropout
import test_indexer
import test_indexer_loss
import test_linear
import test_pair_bias
import test_pointwise
import test_selection_mass
import test_skipping
import test_stick_breaking
from sparseflash.backends.cpu import build
from sparseflash.backends.cpu.library import Native

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler here")
SEED = int(os.environ.get("SPARSEFLASH_SEED", "0"))
RUNNABLE = [level for level in build.LEVELS.values() if level.needs <= build.cpu_flags()]


@functools.cache
def libraries() -> dict[str, Native]:
    """Levels that run here, out of two libraries: the one every program uses, and one of all the rest."""
    first = build.choices()[0]
    found = {}
    for levels in (first, [level for level in RUNNABLE if level not in first]):
        library, path = build.library(levels)
        names = [library.sf_level_name(i).decode() for i in range(library.sf_levels())]
        for level in levels:
            at = names.index(level.source or level.name)
            found[level.name] = Native(library, str(path), at, at, tuple(names))
    return found


def native(name: str) -> Native:
    """A level by its name; skips where the processor lacks something."""
    missing = sorted(build.LEVELS[name].needs - build.cpu_flags())
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    return libraries()[name]


def hold(found: Native, random_cases: range, *, bf16: bool = False, sharp: slice = slice(None)) -> None:
    """Hold a level to sharp cases and to random ones; one with bf16 products runs only bf16."""
    own = {"dtype": torch.bfloat16} if bf16 else {}
    cases = [*cpu_cases.sharp()[sharp], *((seed, {}) for seed in random_cases)]
    with cpu_cases.using(found):
        _, wrong = cpu_cases.hold((seed, fixed | own) for seed, fixed in cases)
    assert not wrong, "\n\n".join(wrong)


def hold_other_ops(found: Native, dtype: torch.dtype) -> None:
    """Statistics of the weights, and the ops that are no softmax, a case or two each."""
    fresh = torch.Generator
    with cpu_cases.using(found):
        for seed, kind in enumerate(("lists", "buckets", "lists")):
            few = {"tile": 3, "unit": 1} if seed == 2 else {}
            cpu_cases.check_stats(
                cpu_cases.case(seed, kind=kind, Tq=70, D=40, B=1, heads=(2, 1), dtype=dtype, **few)
            )
        test_indexer.test_what_is_chosen_beats_what_is_not("cpu", dtype, 129, 80, 70, 33, fresh())
        test_indexer.test_ranges_padding_and_offsets("cpu", dtype, fresh())
        for name in test_pointwise.F:
            test_pointwise.test_odd_shapes_and_strides("cpu", dtype, name, 63, 80, 80, fresh())
        test_linear.test_results_and_gradients_are_those_of_the_sum_over_pairs(
            "cpu", dtype, 129, 64, 80, fresh()
        )
        own = [
            how for how in test_selection_mass.HOWS if how != "mean" or dtype != torch.bfloat16
        ]  # fp32 means
        test_selection_mass.test_halves_and_any_strides(fresh(), dtype, "cpu", own)
        if found.names[found.fp32] not in ("avx512bf16", "amx"):  # they have no fp32 arithmetic of their own
            test_stick_breaking.test_results_and_gradients_are_those_of_the_product_formula(
                "cpu", dtype, 129, 64, 80, fresh()
            )
            for shape in test_selection_mass.SHAPES[2:6]:
                test_selection_mass.test_a_probe_is_the_softmax_of_the_last_rows(fresh(), shape, True, "cpu")
                for how in test_selection_mass.HOWS:
                    test_selection_mass.test_masses_are_those_of_every_weight_formed(
                        fresh(), shape, how, "cpu"
                    )
            test_selection_mass.test_top_indices_are_the_places_of_top_k(fresh(), "cpu")
            test_selection_mass.test_the_running_kth_is_that_of_each_prefix(fresh(), "cpu")
            for stage in ("warm-up", "sparse"):
                test_indexer_loss.test_strides_softcap_and_heads_that_saw_nothing("cpu", stage, fresh())


def hold_arguments(found: Native, dtype: torch.dtype, *, bf16: bool) -> None:
    """Dropout, biases of pairs, skipping, over tiles and over lists of a few queries."""
    with cpu_cases.using(found), cpu_cases.one_thread():
        for seed, kind in enumerate(("lists", "members"), 1):
            test_dropout.test_random_plans_give_the_exact_result_and_gradients("cpu", dtype, kind, seed)
            test_pair_bias.test_random_plans_under_alibi_are_exact_forward_and_backward(
                "cpu", dtype, kind, seed
            )
            if not bf16:  # these draw their dtype
                test_pair_bias.test_random_plans_under_a_matrix_are_exact_forward_and_backward(
                    "cpu", kind, seed
                )
                test_pair_bias.test_a_bias_by_distance_is_its_matrix_and_its_gradient_that_of_diagonals(
                    "cpu", kind, seed
                )
        test_skipping.test_what_is_skipped_is_what_the_definition_says("cpu", dtype, 64, torch.Generator())


def hold_decode(found: Native, dtype: torch.dtype) -> None:
    """Ragged, paged and shared caches, in several layouts; any plan; with scratch full of NaN."""
    fresh = torch.Generator
    with cpu_cases.using(found), cpu_cases.poisoned(), cpu_cases.one_thread():
        for shape in test_decode.SHAPES:
            test_decode.test_every_sequence_sees_its_own_length_and_nothing_behind_it(
                shape, "cpu", dtype, fresh()
            )
        test_decode.test_bias_softcap_sinks_and_scale_are_those_of_attention("cpu", dtype, fresh())
        test_decode.test_any_plan_decodes("cpu", dtype, SEED)
        test_decode.test_a_paged_cache_with_pages_in_common("cpu", dtype, fresh())
        test_decode.test_a_prefix_that_all_sequences_share_is_one_list("cpu", dtype, fresh())
        test_decode.test_order_of_the_batch_and_layout_of_the_cache_do_not_show("cpu", dtype, fresh())
        test_decode.test_the_number_of_threads_does_not_show(dtype, fresh())


@pytest.mark.parametrize("name", build.LEVELS)
def test_a_level_agrees_with_fp64(name):
    """A share of the sharp cases for each level that runs here: together they have them all."""
    found, names = native(name), [level.name for level in RUNNABLE]
    at = names.index(name)
    first = 100 * SEED + 3 * at
    share = slice(at, None, len(names))
    hold(found, range(first, first + 3), bf16=build.LEVELS[name].bf16, sharp=share)


@pytest.mark.slow
@pytest.mark.parametrize("name", build.LEVELS)
def test_a_level_runs_the_other_ops(name):
    hold_other_ops(native(name), torch.bfloat16 if build.LEVELS[name].bf16 else torch.float16)


@pytest.mark.parametrize("name", build.LEVELS)
def test_a_level_knows_dropout_biases_and_skipping(name):
    own = build.LEVELS[name].bf16
    hold_arguments(native(name), torch.bfloat16 if own else torch.float32, bf16=own)


DECODES = [
    (level.name, dtype)
    for level in build.LEVELS.values()
    for dtype in ((torch.bfloat16,) if level.bf16 else cpu_cases.DTYPES)
]


@pytest.mark.parametrize("name, dtype", DECODES, ids=str)
def test_a_level_decodes(name, dtype):
    hold_decode(native(name), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", build.LEVELS)
def test_a_level_agrees_with_fp64_over_many_cases(name):
    first = 10_000 + 1000 * SEED
    hold(native(name), range(first, first + 400), bf16=build.LEVELS[name].bf16)


@pytest.mark.slow
def test_the_portable_level_needs_no_flags():
    plain = replace(build.LEVELS["portable"], flags=())
    library, path = build.library([plain])
    hold(Native(library, str(path), 0, 0, ("portable",)), range(0))


@pytest.mark.slow
@pytest.mark.skipif(build.platform.machine() not in ("x86_64", "AMD64"), reason="needs a compiler for x86-64")
def test_levels_are_built_also_where_they_cannot_run():
    library, _ = build.library([build.LEVELS["avx512"], build.LEVELS["amx"]])
    assert [library.sf_level_name(i) for i in range(library.sf_levels())] == [b"avx512", b"amx"]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_another_compiler_builds_the_same_levels(compiler, monkeypatch):
    found, default = shutil.which(compiler), build.find_compiler()[0]
    if not found or os.path.realpath(found) == os.path.realpath(default):
        pytest.skip(
            f"{compiler} is the one used anyway" if found else f"no {compiler} here: install it to try"
        )
    monkeypatch.setenv("CXX", compiler)
    levels = [level for level in RUNNABLE if level.name != "amx-emulated"]
    library, path = build.library(levels)
    for at, level in enumerate(levels):
        hold(Native(library, str(path), at, at, (level.name,)), range(0), bf16=level.bf16)


@pytest.mark.slow
def test_neon_agrees_with_fp64_on_an_emulated_processor(tmp_path):
    """The shipped sources, compiled for AArch64, in a process of their own."""
    compiler, emulator = (shutil.which(x) for x in ("aarch64-linux-gnu-g++", "qemu-aarch64"))
    if not compiler or not emulator:
        pytest.skip(
            "needs a cross compiler and an emulator; on Debian: apt install g++-aarch64-linux-gnu qemu-user"
        )
    program = cpu_remote.make(tmp_path, "neon", [compiler], flags=("-march=armv8-a",))
    remote = cpu_remote.Remote([emulator, str(program)])
    found = Native(remote, str(program), 0, 0, ("neon",))
    hold(found, range(20_000 + 100 * SEED, 20_060 + 100 * SEED))
    for dtype in cpu_cases.DTYPES:
        hold_other_ops(found, dtype)
        hold_decode(found, dtype)
    hold_arguments(found, torch.float32, bf16=False)
    hold_arguments(found, torch.bfloat16, bf16=True)
    remote.close()
