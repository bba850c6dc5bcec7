"""kernels/gather.py, kernels/advance.py and their torch twins, all compared with plain Python lists."""

from __future__ import annotations

import doctest
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from gather_oracle import Laid, lay_out, many
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
from nanopack.kernels.advance import advance, advance_bytes
from nanopack.kernels.gather import gather, gather_bytes
from nanopack.kernels.gather_torch import advance_torch, gather_torch
from pack_oracle import (
    ALL_EXTRAS,
    SINGLES,
    SUBSETS,
    WORD_BYTES,
    Row,
    assert_exact,
    flat_starts,
    full_row,
    make_rows,
    poisoned,
)

AS_STORED = {"all_in_loss": False, "marked": False}
LOSSES = [{"all_in_loss": everything, "marked": marked} for everything in (False, True) for marked in (False, True)]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=["as stored", "marked", "all in the loss", "all but marked"])

each_executor = each_executor_of(gather, gather_torch)


def check(executor: Callable, laid: Laid, seq_len: int, extras: frozenset[str], loss=AS_STORED) -> None:
    outputs = poisoned((len(laid.rows), seq_len), extras, len(laid.cu), DEVICE)
    executor(laid.words.to(DEVICE), laid.table.to(DEVICE), *outputs.values(), **NUMBERS, **loss)
    assert_exact(outputs, laid.seen(**loss), laid)


@each_executor
@given(
    seed=st.integers(0, 2**32 - 1),
    batch_size=st.integers(1, 4),
    seq_len=st.sampled_from([1, 2, 3, 127, 128, 129, 384, 640]) | st.integers(1, 300),
    word_bytes=st.sampled_from(WORD_BYTES),
    extras=st.sampled_from(SUBSETS),
    loss=st.sampled_from(LOSSES),
)
def test_any_batch_equals_plain_python(executor, seed, batch_size, seq_len, word_bytes, extras, loss):
    rows = make_rows(seed, batch_size, seq_len, word_bytes)
    laid = lay_out(rows, seq_len, word_bytes, seed, marked=loss["marked"])
    check(executor, laid, seq_len, extras, loss)


@each_executor
@each_width
@each_subset
def test_every_combination_of_extras_equals_plain_python(executor, word_bytes, extras):
    for seq_len in (128, 129):
        rows = make_rows(len(extras), 3, seq_len, word_bytes)
        check(executor, lay_out(rows, seq_len, word_bytes), seq_len, extras)


@each_executor
@each_width
@each_loss
@pytest.mark.parametrize("edge", EDGES)
def test_edges_equal_plain_python(executor, word_bytes, loss, edge):
    seq_len, rows = EDGES[edge]
    laid = lay_out(rows, seq_len, word_bytes, marked=loss["marked"])
    check(executor, laid, seq_len, ALL_EXTRAS, loss)


@each_executor
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64, 130])
def test_cu_seqlens_of_many_rows_equal_plain_python(executor, batch_size):
    rows = make_rows(batch_size, batch_size, 3, 2)
    check(executor, lay_out(rows, 3, 2), 3, ALL_EXTRAS)


@each_executor
def test_numbers_are_exact_up_to_their_types_ends(executor):
    laid = lay_out([Row([2**31 - 1] * 128, [True] * 128, [(0, 1.0)])], 129, 4)
    outputs = poisoned((1, 129), frozenset(), 0, DEVICE)
    numbers = {"bos_id": 2**31 - 2, "ignore_index": -(2**62)}
    executor(laid.words.to(DEVICE), laid.table.to(DEVICE), *outputs.values(), **numbers, **AS_STORED)
    assert outputs["inputs"].tolist() == [[2**31 - 1] * 128 + [2**31 - 2]]
    assert outputs["targets"].tolist() == [[2**31 - 1] * 127 + [-(2**62)] * 2]


@each_executor
@each_width
@pytest.mark.skipif(DEVICE != "cpu", reason="takes 10 GB, which only costs nothing where memory is a sparse file")
def test_runs_beyond_two_to_the_31_are_found(executor, word_bytes, tmp_path):
    rows = [full_row(200, [(0, 0.5), (77, 0.25)], token=11), Row(), Row([5] * 30, [True] * 30, [(0, 2.0), (3, 1.0)])]
    laid = lay_out(rows, 200, word_bytes)
    beyond = 2**31 + 5
    with open(tmp_path / "words", "wb") as file:
        file.seek(beyond * word_bytes)
        file.write(laid.words.numpy().tobytes())
    words = torch.from_numpy(np.memmap(tmp_path / "words", f"i{word_bytes}", "r+"))
    table = laid.table.clone()
    for b in range(len(rows)):
        _, first, count, _ = table[4 * b : 4 * b + 4].tolist()
        table.view(torch.int64).view(-1, 2)[first : first + count, 1] += beyond
    check(executor, replace(laid, words=words, table=table), 200, ALL_EXTRAS)


@pytest.mark.parametrize("executors", [(gather, advance), (gather_torch, advance_torch)], ids=["triton", "torch"])
@pytest.mark.parametrize("word_bytes", WORD_BYTES)
def test_a_counter_names_each_batch_in_turn_and_then_padding(executors, word_bytes):
    load, step = executors
    batches = [make_rows(seed, 3, 130, word_bytes) for seed in range(4)]
    laid = lay_out([row for rows in batches for row in rows], 130, word_bytes)
    # the same words for all batches: each has the entries of its rows, under heads of its own
    tables = [batch_of(laid, range(3 * k, 3 * k + 3), 130) for k in range(4)]
    buffer = many([table for table, _, _ in tables], 3, 130)
    table, counter = buffer.table.to(DEVICE), buffer.counter.clone().to(DEVICE)
    facts = torch.full((4,), 111, dtype=torch.int64, device=DEVICE)
    empty = ([Row()] * 3, [0, 130, 260, 390])
    for number, (rows, cu) in enumerate([*(rest for _, *rest in tables), empty, empty]):
        outputs = poisoned((3, 130), ALL_EXTRAS, len(cu), DEVICE)
        load(laid.words.to(DEVICE), table, *outputs.values(), **NUMBERS, **AS_STORED, counter=counter)
        step(table.view(torch.int64), counter, facts)
        assert_exact(outputs, rows, replace(laid, cu=cu))
        assert facts.tolist() == buffer.facts[min(number, 4)]
        assert (counter - buffer.counter.to(DEVICE)).tolist() == [number + 1, number + 1, 0]


def batch_of(laid: Laid, which: range, seq_len: int) -> tuple[torch.Tensor, list[Row], list[int]]:
    """The table of some of the rows, those rows, and their cu_seqlens."""
    old = laid.table.view(-1, 4).numpy()
    rows = [laid.rows[b] for b in which]
    table = np.zeros((len(which) + 1 + sum(len(row.pieces) for row in rows), 4), np.int32)
    at, segments = len(which) + 1, 0
    for b, (own, row) in enumerate(zip(which, rows, strict=True)):
        length, first, count, _ = old[own].tolist()
        table[b] = [length, at, count, segments]
        table[at : at + count] = old[first : first + count]
        at += count
        segments += len(flat_starts([row], seq_len)) - 1
    table[len(which)] = [segments, 0, 0, 0]
    return torch.from_numpy(table.reshape(-1)), rows, flat_starts(rows, seq_len)


@interpreted
@each_width
@pytest.mark.parametrize("extras", SINGLES, ids=name_of)
@pytest.mark.parametrize("shape", [(3, 1), (1, 127), (3, 129), (1, 384), (2, 640)], ids=lambda s: f"B={s[0]} T={s[1]}")
def test_the_kernel_writes_every_element_once_and_reads_only_what_it_may(monkeypatch, shape, word_bytes, extras):
    batch_size, seq_len = shape
    laid = lay_out(make_rows(1, batch_size, seq_len, word_bytes), seq_len, word_bytes)
    outputs = poisoned(shape, extras, len(laid.cu))
    watch = Watch(monkeypatch)
    gather(laid.words, laid.table, *outputs.values(), **NUMBERS, **AS_STORED)
    assert watch.written == Counter(a for t in outputs.values() if t is not None for a in bytes_of(t))
    assert watch.read.keys() <= allowed(laid)


def allowed(laid: Laid) -> set[int]:
    """Addresses of the words of pieces, and of the entries of rows and pieces."""
    table, addresses = laid.table.view(-1, 4), bytes_of(laid.table)
    entries, words = [*range(len(laid.rows) + 1)], []
    for b in range(len(laid.rows)):
        length, first, count, _ = table[b].tolist()
        entries += range(first, first + count)
        runs = pairwise([*table[first : first + count, 0].tolist(), length])
        origins = table.view(torch.int64)[first : first + count, 1].tolist()
        words += [origin + c for origin, (begin, end) in zip(origins, runs, strict=False) for c in range(begin, end)]
    size, start = laid.words.element_size(), laid.words.data_ptr()
    of_words = {start + size * word + byte for word in words for byte in range(size)}
    return of_words | {addresses[16 * entry + byte] for entry in entries for byte in range(16)}


@interpreted
@each_width
@each_subset
def test_gather_bytes_counts_what_the_kernel_moves(monkeypatch, extras, word_bytes):
    rows = [full_row(128, [(0, 1.0), (50, 0.5)]), full_row(128, [(0, 2.0)]), full_row(128, [(0, 2.0), (2, 0.5)])]
    laid = lay_out(rows, 128, word_bytes)
    outputs = poisoned((3, 128), extras, len(laid.cu))
    watch = Watch(monkeypatch)
    gather(laid.words, laid.table, *outputs.values(), **NUMBERS, **AS_STORED)
    asked = {name: name in extras for name in ("weights", "positions", "doc_ids")}
    cu_size = outputs["cu_seqlens"].numel() if "cu_seqlens" in extras else 0
    counted = gather_bytes(3, 128, word_bytes=word_bytes, n_words=3 * 129, n_pieces=5, cu_size=cu_size, **asked)
    assert len(watch.read) + len(watch.written) == counted


@interpreted
def test_advance_bytes_counts_what_the_kernel_moves(monkeypatch):
    records = torch.arange(64).view(-1)
    watch = Watch(monkeypatch)
    advance(records, torch.tensor([0, 2, 7]), torch.zeros(4, dtype=torch.int64))
    assert len(watch.read) + len(watch.written) == advance_bytes()


def test_the_examples_are_true():
    assert doctest.testmod(sys.modules[gather_bytes.__module__]) == (0, 1)
    assert doctest.testmod(sys.modules[advance_bytes.__module__]) == (0, 1)


@guarded
@pytest.mark.parametrize("executor", ["triton", "torch"])
def test_no_executor_touches_the_memory_around_data_and_tables_and_if_it_did_its_process_would_end(executor):
    script = Path(__file__).parents[1] / "support" / "guard_gather.py"
    done = forked.run(script, executor, timeout=300, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    ended = {"gathered after": 0, "gathered before": 0}
    ended |= {"overrun after": -signal.SIGSEGV, "overrun before": -signal.SIGSEGV}
    assert json.loads(done.stdout) == ended, done.stderr[-2000:]


def test_the_twin_imports_no_triton():
    code = "import sys, nanopack.kernels.gather_torch; print([m for m in sys.modules if m.split('.')[0] == 'triton'])"
    assert run_python(code).stdout == "[]\n"


@each_loss
def test_the_twins_never_wait_for_an_accelerator(loss):
    # Tensors on "meta" hold no numbers: whatever asked for one, to size a result or to decide, would raise.
    laid = lay_out(make_rows(1, 2, 128, 2), 128, 2)
    outputs = poisoned((2, 128), ALL_EXTRAS, 0, "meta")
    buffer = many([laid.table], 2, 128)
    table, counter = buffer.table.to("meta"), buffer.counter.to("meta")
    gather_torch(laid.words.to("meta"), laid.table.to("meta"), *outputs.values(), **NUMBERS, **loss)
    gather_torch(laid.words.to("meta"), table, *outputs.values(), **NUMBERS, **loss, counter=counter)
    advance_torch(table.view(torch.int64), counter, torch.empty(4, dtype=torch.int64, device="meta"))


@pytest.mark.gpu
@on_a_gpu
@each_width
@pytest.mark.parametrize("seq_len", [1, 127, 128, 129, 640, 1000, 2048])
def test_both_executors_agree_on_a_gpu_and_neither_waits(seq_len, word_bytes):
    for loss in LOSSES:
        laid = lay_out(make_rows(3, 5, seq_len, word_bytes), seq_len, word_bytes, marked=loss["marked"])
        words, table = laid.words.cuda(), laid.table.cuda()
        for extras in SINGLES:
            by_kernel, by_twin = (poisoned((5, seq_len), extras, len(laid.cu), "cuda") for _ in range(2))
            with syncs_raise():
                gather(words, table, *by_kernel.values(), **NUMBERS, **loss)
                gather_torch(words, table, *by_twin.values(), **NUMBERS, **loss)
            assert_exact(by_kernel, laid.seen(**loss), laid)
            assert_exact(by_twin, laid.seen(**loss), laid)


@pytest.mark.gpu
@on_a_gpu
def test_a_run_beyond_two_to_the_31_is_found_on_a_gpu():
    rows = [full_row(2048, [(0, 0.5), (77, 0.25)], token=11), Row([5] * 30, [True] * 30, [(0, 2.0), (3, 1.0)])]
    laid = lay_out(rows, 2048, 2)
    beyond = 2**31 + 5
    words = torch.zeros(beyond + len(laid.words), dtype=torch.int16, device="cuda")
    words[beyond:] = laid.words.cuda()
    table = laid.table.clone()
    for b in range(len(rows)):
        _, first, count, _ = table[4 * b : 4 * b + 4].tolist()
        table.view(torch.int64).view(-1, 2)[first : first + count, 1] += beyond
    check(gather, replace(laid, words=words, table=table), 2048, ALL_EXTRAS)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("executors", [(gather, advance), (gather_torch, advance_torch)], ids=["triton", "torch"])
def test_a_captured_load_gives_another_batch_at_each_replay(executors):
    load, step = executors
    laid = lay_out(make_rows(1, 12, 2048, 2), 2048, 2)
    tables = [batch_of(laid, range(4 * k, 4 * k + 4), 2048) for k in range(3)]
    buffer = many([table for table, _, _ in tables], 4, 2048)
    table, counter, words = buffer.table.cuda(), buffer.counter.cuda(), laid.words.cuda()
    facts = torch.zeros(4, dtype=torch.int64, device="cuda")
    records = table.view(torch.int64)
    outputs = poisoned((4, 2048), ALL_EXTRAS, 4 * 2049, "cuda")
    # the first launch compiles, which no capture allows
    load(words, table, *outputs.values(), **NUMBERS, **AS_STORED, counter=counter)
    step(records, counter, facts)
    counter.copy_(buffer.counter)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        load(words, table, *outputs.values(), **NUMBERS, **AS_STORED, counter=counter)
        step(records, counter, facts)
    for number, (_, rows, cu) in enumerate(tables):
        graph.replay()
        assert_exact(outputs, rows, replace(laid, cu=cu))
        assert facts.tolist() == buffer.facts[number]
