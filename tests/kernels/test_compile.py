"""What the kernels become on GPUs, read from the code that Triton compiles for them. No GPU is needed."""

from __future__ import annotations

import functools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import forked
import pytest
from covering import only

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
EXTRAS = [[], ["weights"], ["positions"], ["doc_ids"], ["cu_seqlens"]]
EXTRAS += [sorted(name for extras in EXTRAS for name in extras)]
USUAL, UNUSUAL = 2048, 1001
WIDE = re.compile(r"STG\.E\.128|(buffer|global)_store_dwordx4")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
# A target of each maker; the others take as long again.
each_target = pytest.mark.parametrize("target", only([("sm_90",), ("gfx942",)], TARGETS))
each_width = pytest.mark.parametrize("word_bytes", [2, 4], ids=["16-bit words", "32-bit words"])
each_kernel = pytest.mark.parametrize("kernel", ["pack", "gather"])
few_extras = pytest.mark.parametrize("extras", [EXTRAS[0], EXTRAS[-1]], ids=["no extras", "all extras"])


def start(cache: Path, *what: str) -> forked.Script:
    """Run compile_kernel.py without the interpreter that conftest.py turns on, and with nothing compiled before."""
    script = Path(__file__).parents[1] / "support" / "compile_kernel.py"
    return forked.start(script, *what, TRITON_CACHE_DIR=str(cache), TRITON_INTERPRET=None)


def answer(script: forked.Script) -> Any:
    out, err = script.communicate(timeout=600)
    if "ld.lld not found" in err:
        pytest.skip("triton 3.4 compiles for AMD with ROCm's linker")
    assert script.returncode == 0, err[-3000:]
    return json.loads(out)


@functools.cache
def compiled(target: str) -> dict[str, list[dict[str, Any]]]:
    """What few variants of each kernel became, all in one process: importing Triton takes longer than compiling one."""
    with tempfile.TemporaryDirectory() as cache:
        return answer(start(Path(cache), target, "few", "pack", "gather", "advance"))


def variant(found: list[dict[str, Any]], seq_len: int, word_bytes: int, extras: list[str]) -> dict[str, Any]:
    wanted = (seq_len, word_bytes, extras)
    return next(f for f in found if (f["seq_len"], f["word_bytes"], f["extras"]) == wanted)


def assert_wide(found: dict[str, Any]) -> None:
    assert all(map(WIDE.fullmatch, found["stores"])), found["stores"]
    # A thread has 4 columns: one wide store for inputs, two for the int64 of targets, one for each extra.
    assert sum(found["stores"].values()) == 3 + len(found["extras"])


@each_target
@each_kernel
@each_width
@few_extras
def test_in_the_usual_shape_every_output_is_stored_128_bits_at_a_time(target, kernel, word_bytes, extras):
    assert_wide(variant(compiled(target)[kernel], USUAL, word_bytes, extras))


@each_target
@each_kernel
@each_width
@few_extras
@pytest.mark.parametrize("seq_len", [USUAL, UNUSUAL])
def test_nothing_spills_and_there_is_no_stack(target, kernel, seq_len, word_bytes, extras):
    found = variant(compiled(target)[kernel], seq_len, word_bytes, extras)
    assert (found["stack"], found["spills"]) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["pack", "gather", "graph"])
def test_each_extra_alone_is_stored_wide_too_without_spills_or_a_stack(kernel, tmp_path):
    scripts = [start(tmp_path / target, target, "all", kernel) for target in TARGETS]
    for script in scripts:
        found_on = answer(script)
        for word_bytes in (2, 4):
            for extras in EXTRAS:
                found = variant(found_on[kernel], USUAL, word_bytes, extras)
                assert_wide(found)
                assert (found["stack"], found["spills"]) == (0, [])


@each_target
def test_the_advance_of_a_counter_does_not_spill(target):
    [found] = compiled(target)["advance"]
    assert (found["stack"], found["spills"]) == (0, [])


def test_a_thousand_batches_compile_once_for_each_width_of_words(tmp_path):
    # graph is gather's function: what it compiled would be counted too
    both = start(tmp_path / "a", "launches", "pack", "gather"), start(tmp_path / "b", "launches", "graph")
    assert [answer(script) for script in both] == [{"pack": [1, 2], "gather": [1, 2]}, {"graph": [1, 2]}]
