"""The loaders for nanochat's scripts, against its generators as nanochat_loops.py writes them down again."""

from __future__ import annotations

import gc
import json
import pickle
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import forked
import nanochat_loops
import pytest
import torch
from covering import each
from nanochat_data import (
    BATCHES,
    ENCODING,
    LOADERS,
    RECORDS,
    RENDER,
    TEXTS,
    TOKENIZER,
    TRAIN,
    VAL,
    B,
    T,
    Task,
    W,
    shown,
)

from nanopack.adapters.nanochat import Progress, base_loader, mid_loader, sft_loader


@pytest.fixture(autouse=True)
def producers():
    """A function that gives the processes of loaders made in this test. At its end there are none."""

    def alive() -> set[str]:
        # forked processes have this one's command line
        children = (
            pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
        )
        own = Path("/proc/self/cmdline").read_text()
        return {pid for pid in children if Path(f"/proc/{pid}/cmdline").read_text() == own}

    # a test that failed may hold some
    before = alive()
    yield lambda: alive() - before
    if alive() - before:
        gc.collect()
    assert not alive() - before


def test_the_data_are_what_the_cases_need():
    lengths = [len(RENDER(record)[0]) for record in TRAIN.conversations]
    # nanochat's SFT is defined where every conversation fits a row
    assert 60 < max(lengths) <= T + 1
    assert min(len(RENDER(record)[0]) for record in RECORDS) < T + 1 < max(len(RENDER(record)[0]) for record in RECORDS)
    messages = [message for record in TRAIN.conversations for message in record["messages"]]
    assert {message["role"] for message in messages} == {"system", "user", "assistant"}
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    parts = [part["type"] for content in contents for part in content]
    assert set(parts) == {"text", "python", "python_output"}


@pytest.mark.parametrize(("name", "rank"), each(list(LOADERS), range(W)))
def test_batches_and_progress_are_nanochats(name, rank):
    loader, data, loop, records = LOADERS[name]
    progress = Progress()
    ours = loader(data, TOKENIZER, B, T, device="cpu", rank=rank, world_size=W, progress=progress)
    assert shown(progress) == (0.0, False, 1)
    theirs = loop(records, RENDER, B, T, rank, W)
    for number, (made, (inputs, targets)) in enumerate(islice(zip(theirs, ours, strict=False), BATCHES)):
        assert (inputs.tolist(), targets.tolist(), *shown(progress)) == made, f"batch {number}"
        assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64)
        assert inputs.is_contiguous() and targets.is_contiguous()
    assert number == BATCHES - 1 and progress.current_epoch > 2


@pytest.mark.parametrize("num_iterations", [-1, 0, 5, 1000])
@pytest.mark.parametrize("name", ["mid", "sft"])
def test_trained_reports_the_batch_before(name, num_iterations):
    loader, data, loop, records = LOADERS[name]
    built, trained = Progress(num_iterations), Progress(num_iterations, timing="trained")
    one, other = (
        loader(data, TOKENIZER, B, T, device="cpu", rank=1, world_size=W, progress=progress)
        for progress in (built, trained)
    )
    before = (0.0, False, 1)
    for (x, y, *values), first, second in islice(
        zip(loop(records, RENDER, B, T, 1, W, num_iterations=num_iterations), one, other, strict=False), 80
    ):
        assert (first[0].tolist(), first[1].tolist()) == (second[0].tolist(), second[1].tolist()) == (x, y)
        assert shown(built) == tuple(values)
        assert shown(trained) == before
        before = tuple(values)
    assert built.last_step and trained.last_step


def run(timing: str, accumulated: int, num_iterations: int, texts: int) -> tuple[list[int], list[float]]:
    """Run a loop like nanochat's on documents that differ in their only word; one fills a batch."""
    documents = Task([{"text": chr(97 + i)} for i in range(texts)])
    progress = Progress(num_iterations, timing=timing)
    loader = mid_loader(documents, ENCODING, 1, 1, device="cpu", progress=progress)
    trained, shares = [], []
    x, y = next(loader)
    last_step, approx_progress = progress.last_step, progress.approx_progress
    while not last_step:
        for _ in range(accumulated):
            trained.append(ord(ENCODING.decode(y[0].tolist())) - 97)
            x, y = next(loader)
            last_step, approx_progress = progress.last_step, progress.approx_progress
        shares.append(approx_progress)
    assert x.shape == (1, 1)
    return trained, shares


def test_nanochats_own_timing_leaves_the_last_batch_untrained():
    assert run("built", accumulated=1, num_iterations=4, texts=10) == ([0, 1, 2], [0.5, 0.75, 1.0])
    assert run("built", accumulated=1, num_iterations=-1, texts=3) == ([0, 1], [2 / 3, 0.0])


def test_with_timing_trained_every_batch_up_to_the_last_is_trained():
    assert run("trained", accumulated=1, num_iterations=4, texts=10) == ([0, 1, 2, 3], [0.25, 0.5, 0.75, 1.0])
    assert run("trained", accumulated=2, num_iterations=4, texts=10) == ([0, 1, 2, 3], [0.5, 1.0])
    assert run("trained", accumulated=1, num_iterations=-1, texts=3) == ([0, 1, 2], [1 / 3, 2 / 3, 0.0])
    assert run("trained", accumulated=1, num_iterations=9, texts=2)[0] == [0, 1]


@pytest.mark.parametrize("name", ["mid", "sft"])
def test_a_fresh_validation_loader_starts_over_and_leaves_training_alone(name, producers):
    loader, _, loop, _ = LOADERS[name]
    progress = Progress()
    arguments: dict[str, Any] = {"device": "cpu", "rank": 3, "world_size": W}
    train = loader(TRAIN, TOKENIZER, B, T, progress=progress, **arguments)
    theirs = loop(TRAIN, RENDER, B, T, 3, W)
    expected = [list(made[:2]) for made in islice(loop(VAL, RENDER, B, T, 3, W), 20)]
    for step, (made, (x, y)) in enumerate(islice(zip(theirs, train, strict=False), 60)):
        if step % 20 == 0:
            val = loader(VAL, TOKENIZER, B, T, **arguments)
            assert [[inputs.tolist(), targets.tolist()] for inputs, targets in islice(val, 20)] == expected
        assert (x.tolist(), y.tolist(), *shown(progress)) == made, f"batch {step}"
    del val
    assert len(producers()) == 1


# nanochat's SFT is not defined where a conversation is longer than a row.
@pytest.mark.parametrize("max_document_tokens", [2048, 500, None])
@pytest.mark.parametrize("name, seq_len", [("mid", 96), ("mid", 3000), ("sft", 3000)])
def test_a_conversation_is_cut_at_2048_tokens_or_elsewhere_whatever_a_row_holds(name, seq_len, max_document_tokens):
    loader, _, loop, _ = LOADERS[name]
    long = [{"role": "user", "content": "why? " * 200}, {"role": "assistant", "content": "because. " * 900}]
    data = Task([{"messages": long}, *VAL.conversations[:9]])
    render = partial(RENDER, max_document_tokens=10**6 if max_document_tokens is None else max_document_tokens)
    assert 2048 < len(RENDER(data[0], max_document_tokens=10**6)[0]) <= 3001
    named = {} if max_document_tokens == 2048 else {"max_document_tokens": max_document_tokens}
    ours = loader(data, TOKENIZER, 1, seq_len, device="cpu", **named)
    for made, (x, y) in islice(zip(loop(data, render, 1, seq_len, 0, 1), ours, strict=False), 20_000 // seq_len):
        assert (x.tolist(), y.tolist()) == made[:2]


TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize("loader", [mid_loader, sft_loader])
def test_loss_says_which_targets_are_trained(loader):
    ids, _ = RENDER(TALK)
    user, a, user_end, assistant, b, assistant_end = ids[1:]
    # room for all of it and, in SFT, for two tokens of padding
    size = 6 if loader is mid_loader else 8
    padding = [] if loader is mid_loader else [-1, -1]
    _, of_the_assistant = next(loader(Task([TALK]), TOKENIZER, 1, size, device="cpu", loss="assistant"))
    _, all_of_it = next(loader(Task([TALK]), TOKENIZER, 1, size, device="cpu", loss="all"))
    assert of_the_assistant.tolist() == [[-1, -1, -1, -1, b, assistant_end, *padding]]
    assert all_of_it.tolist() == [[user, a, user_end, assistant, b, assistant_end, *padding]]


def test_sft_cuts_what_nanochat_could_never_place():
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "night" * 300}]}
    progress = Progress()
    loader = sft_loader(Task([long] * 200), TOKENIZER, 1, 16, device="cpu", progress=progress)
    for x, _ in islice(loader, 200):
        assert x[0].tolist() == RENDER(long)[0][:16]
    assert progress.last_step


def test_documents_may_be_strings_records_or_files(tmp_path):
    jsonl = tmp_path / "documents.jsonl"
    jsonl.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "shard.parquet")
    expected = [made[:2] for made in islice(nanochat_loops.base(RECORDS, RENDER, B, T, 0, 1), 5)]
    same = [TEXTS, tuple(TEXTS), Task(TEXTS), RECORDS, Task(RECORDS), jsonl, str(jsonl), [str(jsonl)]]
    for documents in [*same, [str(tmp_path / "*.parquet")]]:
        loader = base_loader(documents, TOKENIZER, B, T, device="cpu", num_workers=0)
        assert [(x.tolist(), y.tolist()) for x, y in islice(loader, 5)] == expected


def test_a_text_of_more_than_2048_tokens_is_not_cut_where_a_row_has_room():
    texts = ["night shift " * 1200, "night", "shift"]
    records = [{"text": text} for text in texts]
    assert 2048 < len(RENDER(records[0])[0]) < 3000
    ours = base_loader(texts, TOKENIZER, 1, 3000, device="cpu")
    for made, (x, y) in islice(zip(nanochat_loops.base(records, RENDER, 1, 3000, 0, 1), ours, strict=False), 3):
        assert (x.tolist(), y.tolist()) == made[:2]


def test_base_loader_reads_the_share_that_torch_distributed_says(monkeypatch):
    for name, value in {"is_initialized": True, "get_rank": 2, "get_world_size": W, "get_backend": "fake"}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    x, y = next(base_loader(TEXTS, TOKENIZER, B, T, device="cpu"))
    assert (x.tolist(), y.tolist()) == next(nanochat_loops.base(RECORDS, RENDER, B, T, 2, W))[:2]


def test_strings_that_only_begin_like_paths_are_texts():
    documents = ["see shard.parquet", "b"]
    x, _ = next(base_loader(documents, TOKENIZER, 1, 32, device="cpu", num_workers=0))
    ids = [id for text in documents for id in RENDER({"text": text})[0]]
    assert set(x[0].tolist()) <= set(ids)
    with pytest.raises(ValueError, match=r"shard\.parquet' does not exist"):
        base_loader(["shard.parquet", "other.jsonl"], TOKENIZER, 1, 32, device="cpu")


def test_inputs_are_int64_on_request():
    loaders = [
        base_loader(TEXTS, TOKENIZER, B, T, device="cpu", input_dtype=dtype) for dtype in (torch.int32, torch.int64)
    ]
    for (narrow, targets), (wide, same) in islice(zip(*loaders, strict=False), 3):
        assert (narrow.dtype, wide.dtype, targets.dtype) == (torch.int32, torch.int64, torch.int64)
        assert torch.equal(narrow.to(torch.int64), wide) and torch.equal(targets, same)


def test_tokenizer_may_be_nanochats_object_an_encoding_or_a_folder(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(ENCODING))
    expected = next(nanochat_loops.midtraining(TRAIN, RENDER, B, T, 0, 1))[:2]
    for tokenizer in (TOKENIZER, ENCODING, tmp_path, str(tmp_path)):
        x, y = next(mid_loader(TRAIN, tokenizer, B, T, device=torch.device("cpu"), num_workers=0))
        assert (x.tolist(), y.tolist()) == expected


def test_tensors_are_fresh():
    loader = mid_loader(TRAIN, TOKENIZER, B, T, device="cpu")
    x, y = next(loader)
    before = x.tolist(), y.tolist()
    x2, y2 = next(loader)
    x2.zero_()
    y2.zero_()
    next(loader)
    assert (x.tolist(), y.tolist()) == before


@pytest.mark.parametrize("loader, data", [(mid_loader, TRAIN), (sft_loader, TRAIN), (base_loader, TEXTS)])
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"B": 0}, "batch_size=0"),
        ({"T": 0}, "seq_len=0"),
        ({"device": "nowhere"}, "device='nowhere'"),
        ({"rank": 4}, "rank=4"),
        ({"world_size": 0}, "world_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"prefetch": 0}, "prefetch=0"),
        ({"progress": 0.0}, r"progress=0\.0"),
        ({"tokenizer": "nowhere"}, "tokenizer='nowhere'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_refused_at_the_call(loader, data, changed, message):
    size = {"B": B, "T": T, "device": "cpu", "rank": 0, "world_size": 1, "tokenizer": TOKENIZER}
    with pytest.raises(ValueError, match=message):
        loader(data, **{**size, **changed})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mid_loader(TRAIN, TOKENIZER, B, T, device="cpu", loss="none"), "loss='none'"),
        (lambda: sft_loader(TRAIN, TOKENIZER, B, T, device="cpu", max_document_tokens=0), "max_document_tokens=0"),
        (lambda: base_loader(TEXTS, TOKENIZER, B, T, device="cpu", input_dtype=torch.float32), "input_dtype=torch.flo"),
        (lambda: base_loader([], TOKENIZER, B, T, device="cpu"), "holds no conversation"),
        (lambda: base_loader(iter(TEXTS), TOKENIZER, B, T, device="cpu"), "has no len"),
        (lambda: base_loader({"text": "a"}, TOKENIZER, B, T, device="cpu"), "is one dict"),
        (lambda: base_loader({"a", "b"}, TOKENIZER, B, T, device="cpu"), "has no len"),
        (lambda: Progress("5"), "num_iterations='5'"),
        (lambda: Progress(-2), "num_iterations=-2"),
        (lambda: Progress(timing="later"), "timing='later'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_only_one_of_them_takes_is_refused_at_the_call_too(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_close_ends_the_producer_also_of_a_loader_that_was_never_started(producers):
    started, fresh = (mid_loader(TRAIN, TOKENIZER, B, T, device="cpu") for _ in range(2))
    next(started)
    assert len(producers()) == 2
    started.close()
    assert len(producers()) == 1
    fresh.close()
    assert not producers()
    assert list(started) == list(fresh) == []


def test_dropping_a_loader_ends_the_producer_also_in_a_cycle(producers):
    loader = mid_loader(TRAIN, TOKENIZER, B, T, device="cpu")
    fresh = mid_loader(TRAIN, TOKENIZER, B, T, device="cpu")
    next(loader)
    del loader, fresh
    assert not producers()
    holder = {"loader": mid_loader(TRAIN, TOKENIZER, B, T, device="cpu")}
    holder["holder"] = holder
    del holder
    gc.collect()
    assert not producers()


def test_a_loop_that_fails_and_a_bad_conversation_end_the_producer(producers):
    with pytest.raises(ZeroDivisionError):
        for _ in sft_loader(TRAIN, TOKENIZER, B, T, device="cpu"):
            raise ZeroDivisionError
    assert not producers()
    loader = mid_loader(Task([{"messages": []}]), TOKENIZER, B, T, device="cpu")
    with pytest.raises(ValueError, match="conversation 0, "):
        next(loader)
    assert not producers()


SCRIPT = """
from nanopack.adapters.nanochat import mid_loader
data = [{"messages": [{"role": "user", "content": "a"}]}]
train_loader, val_loader = (mid_loader(data, "chat32k", 1, 4, device="cpu") for _ in range(2))
print(next(train_loader)[0].shape)
"""


def test_a_script_that_ends_with_its_loaders_open_ends_in_silence(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = forked.run(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([1, 4])\n", "")
