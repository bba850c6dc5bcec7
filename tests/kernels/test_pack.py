"""kernels/pack.py and its torch twin, both compared with plain Python lists."""

from __future__ import annotations

import doctest
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import (
    DEVICE,
    EDGES,
    NUMBERS,
    Watch,
    bytes_of,
    each_executor_of,
    each_subset,
    each_width,
    guarded,
    interpreted,
    name_of,
    on_a_gpu,
    run_python,
    syncs_raise,
)
from nanopack.kernels.pack import pack, pack_bytes
from nanopack.kernels.pack_torch import pack_torch
from pack_oracle import (
    ALL_EXTRAS,
    SINGLES,
    SUBSETS,
    WORD_BYTES,
    Row,
    assert_exact,
    full_row,
    make_rows,
    make_slot,
    poisoned,
)

each_executor = each_executor_of(pack, pack_torch)


def check(executor: Callable, rows: list[Row], seq_len: int, word_bytes: int, extras: frozenset, seed: int = 0) -> None:
    slot = make_slot(rows, seq_len, word_bytes, extras, seed)
    outputs = poisoned((len(rows), seq_len), extras, len(slot.cu), DEVICE)
    executor(*slot.views(slot.data.to(DEVICE)), *outputs.values(), **NUMBERS)
    assert_exact(outputs, rows, slot)


@each_executor
@given(
    seed=st.integers(0, 2**32 - 1),
    batch_size=st.integers(1, 4),
    seq_len=st.sampled_from([1, 2, 3, 127, 128, 129, 384, 640]) | st.integers(1, 300),
    word_bytes=st.sampled_from(WORD_BYTES),
    extras=st.sampled_from(SUBSETS),
)
def test_any_batch_equals_plain_python(executor, seed, batch_size, seq_len, word_bytes, extras):
    check(executor, make_rows(seed, batch_size, seq_len, word_bytes), seq_len, word_bytes, extras, seed)


@each_executor
@each_width
@each_subset
def test_every_combination_of_extras_equals_plain_python(executor, word_bytes, extras):
    for seq_len in (128, 129):
        check(executor, make_rows(len(extras), 3, seq_len, word_bytes), seq_len, word_bytes, extras)


@each_executor
@each_width
@pytest.mark.parametrize("edge", EDGES)
def test_edges_equal_plain_python(executor, word_bytes, edge):
    seq_len, rows = EDGES[edge]
    check(executor, rows, seq_len, word_bytes, ALL_EXTRAS)


@each_executor
def test_numbers_are_exact_up_to_their_types_ends(executor):
    slot = make_slot([Row([2**31 - 1] * 128, [True] * 128)], 129, 4, frozenset())
    outputs = poisoned((1, 129), frozenset(), 0, DEVICE)
    executor(*slot.views(slot.data.to(DEVICE)), *outputs.values(), bos_id=2**31 - 2, ignore_index=-(2**62))
    assert outputs["inputs"].tolist() == [[2**31 - 1] * 128 + [2**31 - 2]]
    assert outputs["targets"].tolist() == [[2**31 - 1] * 127 + [-(2**62)] * 2]


@interpreted
@each_width
@pytest.mark.parametrize("extras", SINGLES, ids=name_of)
@pytest.mark.parametrize("shape", [(3, 1), (1, 127), (3, 129), (1, 384), (2, 640)], ids=lambda s: f"B={s[0]} T={s[1]}")
def test_the_kernel_writes_every_element_once_and_reads_the_slot_alone(monkeypatch, shape, word_bytes, extras):
    batch_size, seq_len = shape
    slot = make_slot(make_rows(1, batch_size, seq_len, word_bytes), seq_len, word_bytes, extras)
    outputs = poisoned(shape, extras, len(slot.cu))
    watch = Watch(monkeypatch)
    pack(*slot.views(), *outputs.values(), **NUMBERS)
    assert watch.written == Counter(a for t in outputs.values() if t is not None for a in bytes_of(t))
    outside = sorted(watch.read.keys() - set(bytes_of(slot.data)))
    assert not outside, f"byte {outside[0] - slot.data.data_ptr()} of {len(slot.data)}"


@interpreted
@each_width
@each_subset
def test_pack_bytes_counts_what_the_kernel_moves(monkeypatch, extras, word_bytes):
    # Full rows, so that no row's T+1 words reach into the next one's.
    rows = [full_row(128, [(0, 1.0), (50, 0.5)]), full_row(128, [(0, 2.0)]), full_row(128, [(0, 2.0)])]
    slot = make_slot(rows, 128, word_bytes, extras)
    outputs = poisoned((3, 128), extras, len(slot.cu))
    watch = Watch(monkeypatch)
    pack(*slot.views(), *outputs.values(), **NUMBERS)
    asked = {name: name in extras for name in ("weights", "positions", "doc_ids")}
    cu_size = outputs["cu_seqlens"].numel() if "cu_seqlens" in extras else 0
    counted = pack_bytes(3, 128, word_bytes=word_bytes, n_pieces=4, n_cu=len(slot.cu), cu_size=cu_size, **asked)
    assert len(watch.read) + len(watch.written) == counted


@interpreted
def test_a_row_of_a_thousand_pieces_costs_ten_loads_more_than_a_row_of_one(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    load, calls = builder.create_masked_load, []
    monkeypatch.setattr(builder, "create_masked_load", lambda *args: (calls.append(0), load(*args))[1])
    loads, extras = [], ALL_EXTRAS - {"cu_seqlens"}
    for pieces in (1, 512, 513, 1024):
        slot = make_slot([full_row(1024, [(c, 1.0) for c in range(pieces)])], 1024, 2, extras)
        calls.clear()
        pack(*slot.views(), *poisoned((1, 1024), extras, 0).values(), **NUMBERS)
        loads.append(len(calls))
    blocks = 2
    assert [n - loads[0] for n in loads] == [0, 9 * blocks, 10 * blocks, 10 * blocks]


def test_the_example_of_pack_bytes_is_true():
    # kernels/ is not where pytest looks for examples: under that name it refuses to be imported.
    assert doctest.testmod(sys.modules[pack_bytes.__module__]) == (0, 1)


@guarded
@pytest.mark.parametrize("executor", ["triton", "torch"])
def test_no_executor_touches_the_memory_around_a_slot_and_if_it_did_its_process_would_end(executor):
    script = Path(__file__).parents[1] / "support" / "guard_pack.py"
    done = forked.run(script, executor, timeout=300, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    ended = {"packed after": 0, "packed before": 0, "overrun after": -signal.SIGSEGV, "overrun before": -signal.SIGSEGV}
    assert json.loads(done.stdout) == ended, done.stderr[-2000:]


def test_the_folder_kernels_refuses_to_be_a_package_of_that_name():
    done = run_python("import kernels")
    assert "ImportError" in done.stderr and "nanopack.kernels" in done.stderr


def test_the_twin_imports_no_triton():
    code = "import sys, nanopack.kernels.pack_torch; print([m for m in sys.modules if m.split('.')[0] == 'triton'])"
    assert run_python(code).stdout == "[]\n"


def test_the_twin_never_waits_for_an_accelerator():
    # Tensors on "meta" hold no numbers: whatever asked for one, to size a result or to decide, would raise.
    outputs = poisoned((2, 128), ALL_EXTRAS, 0, "meta")
    slot = make_slot(make_rows(1, 2, 128, 2), 128, 2, ALL_EXTRAS)
    pack_torch(*slot.views(slot.data.to("meta")), *outputs.values(), **NUMBERS)


@pytest.mark.gpu
@on_a_gpu
@each_width
@pytest.mark.parametrize("seq_len", [1, 127, 128, 129, 640, 1000, 2048])
def test_both_executors_agree_on_a_gpu_and_neither_waits(seq_len, word_bytes):
    rows = make_rows(3, 5, seq_len, word_bytes)
    for extras in SUBSETS:
        slot = make_slot(rows, seq_len, word_bytes, extras)
        data = slot.data.cuda()
        by_kernel, by_twin = (poisoned((5, seq_len), extras, len(slot.cu), "cuda") for _ in range(2))
        with syncs_raise():
            pack(*slot.views(data), *by_kernel.values(), **NUMBERS)
            pack_torch(*slot.views(data), *by_twin.values(), **NUMBERS)
        assert_exact(by_kernel, rows, slot)
        assert_exact(by_twin, rows, slot)


@pytest.mark.gpu
@on_a_gpu
def test_a_captured_launch_packs_whatever_the_slot_then_holds():
    batches = [make_rows(seed, 4, 2048, 2) for seed in range(5)]
    slots = [make_slot(rows, 2048, 2, ALL_EXTRAS) for rows in batches]
    data = torch.zeros(max(len(s.data) for s in slots), dtype=torch.uint8, device="cuda")
    outputs = poisoned((4, 2048), ALL_EXTRAS, max(len(s.cu) for s in slots), "cuda")
    # The first launch compiles, which no capture allows. It packs rows without a word.
    pack(*slots[0].views(data), *outputs.values(), **NUMBERS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pack(*slots[0].views(data), *outputs.values(), **NUMBERS)
    for rows, slot in zip(batches, slots, strict=True):
        data[: len(slot.data)] = slot.data.cuda()
        graph.replay()
        assert_exact(outputs, rows, slot)
