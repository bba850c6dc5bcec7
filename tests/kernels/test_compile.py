"""What the kernels become on GPUs, read from the code that Triton compiles for them. No GPU is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
EXTRAS = [[], ["weights"], ["positions"], ["doc_ids"], ["cu_seqlens"]]
EXTRAS += [sorted(name for extras in EXTRAS for name in extras)]
USUAL, UNUSUAL = 2048, 1001
WIDE = re.compile(r"STG\.E\.128|(buffer|global)_store_dwordx4")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
each_target = pytest.mark.parametrize("target", TARGETS)
each_width = pytest.mark.parametrize("word_bytes", [2, 4], ids=["16-bit words", "32-bit words"])
few_extras = pytest.mark.parametrize("extras", [EXTRAS[0], EXTRAS[-1]], ids=["no extras", "all extras"])


def start(cache: Path, *what: str) -> subprocess.Popen[str]:
    """Run compile_kernel.py without the interpreter that conftest.py turns on, and with nothing compiled before."""
    env = dict(os.environ, TRITON_CACHE_DIR=str(cache), OMP_NUM_THREADS="1")
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "compile_kernel.py"), *what]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out)


def compile_for_all(kernel: str, which: str, cache: Path) -> dict[str, list[dict[str, Any]]]:
    """For each target, what every variant became."""
    processes = {target: start(cache / target, kernel, target, which) for target in TARGETS}
    return {target: answer(process) for target, process in processes.items()}


@pytest.fixture(scope="module", params=["pack", "gather", pytest.param("graph", marks=pytest.mark.slow)])
def compiled(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return compile_for_all(request.param, "few", tmp_path_factory.mktemp("triton"))


def variant(
    compiled: dict[str, list[dict[str, Any]]], target: str, seq_len: int, word_bytes: int, extras: list[str]
) -> dict[str, Any]:
    wanted = (seq_len, word_bytes, extras)
    return next(f for f in compiled[target] if (f["seq_len"], f["word_bytes"], f["extras"]) == wanted)


def assert_wide(found: dict[str, Any]) -> None:
    assert all(map(WIDE.fullmatch, found["stores"])), found["stores"]
    # A thread has 4 columns: one wide store for inputs, two for the int64 of targets, one for each extra.
    assert sum(found["stores"].values()) == 3 + len(found["extras"])


@each_target
@each_width
@few_extras
def test_in_the_usual_shape_every_output_is_stored_128_bits_at_a_time(compiled, target, word_bytes, extras):
    assert_wide(variant(compiled, target, USUAL, word_bytes, extras))


@each_target
@each_width
@few_extras
@pytest.mark.parametrize("seq_len", [USUAL, UNUSUAL])
def test_nothing_spills_and_there_is_no_stack(compiled, target, seq_len, word_bytes, extras):
    found = variant(compiled, target, seq_len, word_bytes, extras)
    assert (found["stack"], found["spills"]) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["pack", "gather", "graph"])
def test_each_extra_alone_is_stored_wide_too_without_spills_or_a_stack(kernel, tmp_path):
    compiled = compile_for_all(kernel, "all", tmp_path)
    for target in TARGETS:
        for word_bytes in (2, 4):
            for extras in EXTRAS:
                found = variant(compiled, target, USUAL, word_bytes, extras)
                assert_wide(found)
                assert (found["stack"], found["spills"]) == (0, [])


def test_the_advance_of_a_counter_does_not_spill(tmp_path):
    for [found] in compile_for_all("advance", "few", tmp_path).values():
        assert (found["stack"], found["spills"]) == (0, [])


@pytest.mark.parametrize("kernel", ["pack", "gather", "graph"])
def test_a_thousand_batches_compile_once_for_each_width_of_words(kernel, tmp_path):
    assert answer(start(tmp_path, kernel, "launches")) == [1, 2]
