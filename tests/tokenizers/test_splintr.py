"""Promises of nanopack/tokenizers/splintr.py."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
import sys
import threading
import unicodedata

import numpy as np
import pytest
import tiktoken
from data_sets import SHIPPED
from fuzz_texts import TEXTS, fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from split_patterns import PATTERNS, PATTERNS_IN_CONTEXT

import nanopack
from nanopack import EncoderError, Loader, cli, reference
from nanopack.conversations.records import check, open_conversations
from nanopack.tokenizers import splintr as fast
from nanopack.tokenizers.splintr import FastTokenizer, choose_encoder
from nanopack.tokenizers.tokenizer import Tokenizer, load_tokenizer
from nanopack.verify import compare

pytest.importorskip("splintr", reason="splintr-rs is not installed: pip install nanopack-gpu[fast]")

TOKENIZER = load_tokenizer("chat32k")
FAST = FastTokenizer(TOKENIZER.encoding)
SMALL = {"batch_size": 4, "seq_len": 64, "epochs": 1}
CHATS = [
    [
        {"role": "user", "content": f"Say {i} naïve <|bos|> things."},
        {"role": "assistant", "content": "Ça va 漢字! " * i},
    ]
    for i in range(1, 60)
]


def encoding(pattern: str) -> tiktoken.Encoding:
    ranks = TOKENIZER.encoding._mergeable_ranks
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|bos|>": len(ranks)})


TOKENIZERS = {name: FastTokenizer(encoding(pattern)) for name, pattern in PATTERNS.items()}


class Broken:
    """A core that gives another last id for some texts."""

    def __init__(self, core, wrong) -> None:
        self._core, self._wrong = core, wrong

    def encode_flat(self, text: str) -> bytes:
        ids = self._core.encode_flat(text)
        return ids[:-4] + b"\1\0\0\0" if self._wrong(text) else ids


def break_core(monkeypatch, wrong) -> None:
    whole = FastTokenizer._make_core
    monkeypatch.setattr(FastTokenizer, "_make_core", lambda self: Broken(whole(self), wrong))


# The same ids


@given(st.lists(TEXTS, max_size=4), st.sampled_from(sorted(PATTERNS)))
@example(["\u088f's", "'ſ", "'\u212a"], "chat32k")
@example(["a'ſ", "1'ſs"], "o200k")
def test_every_text_has_tiktokens_ids_in_every_known_pattern(texts, pattern):
    tokenizer = TOKENIZERS[pattern]
    ids, offsets = tokenizer.encode_batch(texts)
    assert (ids.dtype, offsets.dtype, offsets.shape) == (np.uint32, np.int64, (len(texts) + 1,))
    assert (offsets[0], offsets[-1]) == (0, len(ids))
    for i, text in enumerate(texts):
        expected = tokenizer.encoding.encode_ordinary(text)
        assert ids[offsets[i] : offsets[i + 1]].tolist() == expected
        assert tokenizer.encode(text).tolist() == expected


@pytest.mark.parametrize("pattern, context", PATTERNS_IN_CONTEXT)
def test_every_character_has_tiktokens_ids_but_those_that_are_always_left_to_tiktoken(pattern, context):
    """Including those that this version of Python does not know, as another may."""
    tokenizer = TOKENIZERS[pattern]
    expected = Tokenizer(tokenizer.encoding)
    # the other planes are unassigned or private
    points = [*range(0xD800), *range(0xE000, 0x34000), *range(0xE0000, 0xE0200), 0xF0000, 0x10FFFF]
    characters = [chr(point) for point in sorted({*points} - {*fast.UNICODE_17, *fast.UNLIKE})]
    for begin in range(0, len(characters), 4096):
        text = "".join(context.format(c) for c in characters[begin : begin + 4096])
        assert tokenizer._core.encode_flat(text) == expected.encode(text).tobytes()


def test_characters_in_which_the_encoders_differ_go_to_tiktoken_whatever_python_knows():
    table = fast.for_tiktoken(category=lambda character: "Lo")
    assert set(np.flatnonzero(table)) >= {*fast.UNICODE_17, *fast.UNLIKE}


def encoded_by_splintr(text: str) -> bool:
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FAST, "_core", Broken(FAST._core, seen.append))
        FAST.encode(text)
    return seen == [text]


PLAIN = ["", "naïve", "漢字", "Жизнь", "عربي", "हिन्दी", "😀", "👩‍👩‍👧", "✅", "𝒳", "\ue000", "\U0010ffff"]
LEFT_TO_TIKTOKEN = ["\u088f", "\u180e", "aſ\u212a", "\ud800", "\U000e0fff", "\U00050000", "x" * fast.LONG_TEXT]


def test_splintr_encodes_all_but_few_characters_and_long_texts():
    assert all(map(encoded_by_splintr, [*PLAIN, "x" * (fast.LONG_TEXT - 1)]))
    assert not any(map(encoded_by_splintr, LEFT_TO_TIKTOKEN))


def test_python_knows_no_unicode_that_the_guard_does_not():
    """If this fails, add what that version brought to UNICODE_17: perhaps only one of the encoders knows it."""
    assert int(unicodedata.unidata_version.split(".")[0]) <= 17


def test_every_text_of_the_shipped_conversations_has_tiktokens_ids():
    source = open_conversations(SHIPPED)
    for index in range(len(source)):
        for message in check(source[index]).messages:
            parts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content]
            for text in parts:
                assert FAST.encode(text).tolist() == TOKENIZER.encoding.encode_ordinary(text)


@pytest.mark.parametrize("piece", ["a", "\0", " ", "\n", "\n ", "é", "漢", "ab", "the ", "1", "=", "'s", "😀"])
@pytest.mark.parametrize("length", [499, 500, 501, 4097, 50_000])
def test_long_runs_have_tiktokens_ids(piece, length):
    text = (piece * length)[:length]
    for variant in (text, f"x{text}", f"{text}y"):
        assert np.array_equal(FAST.encode(variant), TOKENIZER.encode(variant))


@pytest.mark.parametrize("length", [fast.LONG_TEXT - 1, fast.LONG_TEXT])
def test_the_longest_text_that_splintr_gets_and_the_first_that_it_does_not_have_tiktokens_ids(length):
    text = (" " * (length - 1)) + "a"
    assert encoded_by_splintr(text) == (length < fast.LONG_TEXT)
    assert np.array_equal(FAST.encode(text), TOKENIZER.encode(text))


def test_tokens_that_merging_does_not_reach_are_tiktokens():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256, b"bc": 300, b"aaaa": 257, b"aaa": 258}
    odd = tiktoken.Encoding("odd", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={"<|bos|>": 400})
    for text in ("abc", "aabc", "abcabc abc", "aaaaa", "aaaa", "aaaaaaa aaa"):
        assert FastTokenizer(odd).encode(text).tolist() == odd.encode_ordinary(text)


def test_nothing_is_a_batch_too():
    ids, offsets = FAST.encode_batch([])
    assert (ids.tolist(), offsets.tolist(), ids.dtype) == ([], [0], np.uint32)


# What tiktoken refuses or mends


def test_what_tiktoken_refuses_is_refused_in_the_same_words():
    text = "a" + " " * 1_000_001 + "b"
    with pytest.raises(ValueError) as expected:
        TOKENIZER.encode(text)
    for encode in (FAST.encode, lambda text: FAST.encode_batch(["fine", text])):
        with pytest.raises(ValueError) as got:
            encode(text)
        assert str(got.value) == str(expected.value)
    chats = [CHATS[0], [{"role": "user", "content": text}, {"role": "assistant", "content": "No."}], CHATS[1]]
    with Loader(chats, TOKENIZER, encoder="fast", on_error="skip", num_workers=0, **SMALL) as loader:
        list(loader)
        assert loader.ledger()["conversations"]["skipped"] == 1


@pytest.mark.parametrize("text", ["a\ud800b", "\udc00\ud800", "\ud83d\ude00", "\ud800" * 600])
def test_surrogates_mean_what_they_mean_to_tiktoken(text):
    assert FAST.encode(text).tolist() == TOKENIZER.encoding.encode_ordinary(text)
    ids, offsets = FAST.encode_batch(["x", text, "naïve"])
    assert ids[offsets[1] : offsets[2]].tolist() == TOKENIZER.encoding.encode_ordinary(text)


# Patterns and vocabularies


def test_a_pattern_that_is_not_known_to_match_alike_is_refused():
    with pytest.raises(ValueError, match=r"encoder='fast' cannot take 'x': .* not among the known .*; leave"):
        FastTokenizer(encoding(r"\w+|\W+"))


def test_a_vocabulary_without_every_byte_is_refused():
    few = tiktoken.Encoding(
        "few", pat_str=PATTERNS["gpt2"], mergeable_ranks={b"a": 0, b"b": 1}, special_tokens={"<|bos|>": 2}
    )
    with pytest.raises(ValueError, match=r"'few': byte 0x00 has no rank; leave encoder out"):
        choose_encoder("fast", Tokenizer(few), CHATS)


def test_what_splintr_refuses_is_reported_with_its_reason(monkeypatch):
    monkeypatch.setattr(fast, "plain", lambda pattern: "(")
    with pytest.raises(ValueError, match=r"cannot take 'chat32k': splintr-rs says: Regex .*; leave encoder out"):
        choose_encoder("fast", TOKENIZER, CHATS)


@pytest.mark.parametrize("encoder", ["slow", "", True, 5, "FAST"])
def test_an_unknown_encoder_is_refused(encoder):
    with pytest.raises(ValueError, match=r"encoder=.* is not allowed; use one of None, 'fast'"):
        Loader(CHATS, TOKENIZER, encoder=encoder, **SMALL)


def test_without_the_package_there_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "splintr", None)
    with pytest.raises(ImportError, match=r"encoder='fast' needs splintr-rs; pip install nanopack-gpu\[fast\]"):
        Loader(CHATS, TOKENIZER, encoder="fast", **SMALL)
    Loader(CHATS, TOKENIZER, num_workers=0, **SMALL).close()


# A wrong id is noticed


FUZZ = list(fuzz(TOKENIZER))


def test_the_fuzz_texts_have_tiktokens_ids():
    assert not list(filter(None, map(FAST.difference, FUZZ)))


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda text: "a" * 500 in text, id="500-equal-characters"),
        pytest.param(lambda text: "\u1680" in text, id="ogham-space-mark"),
        pytest.param(lambda text: "\0" in text, id="null"),
        pytest.param(lambda text: "\u3000" in text, id="ideographic-space"),
        pytest.param(lambda text: "<|bos|>" in text, id="special-token"),
        pytest.param(lambda text: "\ud800" <= max(text, default="") >= "\U00020000", id="far-planes"),
        pytest.param(lambda text: "漢" in text and "a" in text, id="mixed-scripts"),
    ],
)
def test_the_fuzz_texts_would_show_a_wrong_encoder(wrong, monkeypatch):
    break_core(monkeypatch, wrong)
    broken = FastTokenizer(TOKENIZER.encoding)
    assert any(map(broken.difference, FUZZ))


def test_an_encoder_that_is_wrong_on_the_sample_is_refused_at_construction(monkeypatch):
    break_core(monkeypatch, lambda text: text.startswith("Say 59 "))
    monkeypatch.setattr(fast, "SAMPLE_SECONDS", 60)
    with pytest.raises(ValueError, match=r"differs from tiktoken at token \d+ of a text of .* characters, about ['\"]"):
        Loader(CHATS, TOKENIZER, encoder="fast", **SMALL)


def test_the_error_shows_the_text_where_it_differs_escaped_and_both_ids(monkeypatch):
    broken = FastTokenizer(TOKENIZER.encoding)
    broken._core = Broken(broken._core, lambda text: "x" in text)
    text = "y" * 5000 + "\n漢 x"
    expected = TOKENIZER.encode(text).tolist()
    difference = broken.difference(text)
    assert difference is not None and len(difference) < 300 and difference.isascii()
    assert "of a text of 5,004 characters, about 'yyyy" in difference and "\\n\\u6f22 x'" in difference
    assert f"at token {len(expected) - 1} " in difference
    assert f"expected {expected[-1:]}, got [1]; leave encoder out" in difference


def test_ids_that_are_missing_are_a_difference():
    broken = FastTokenizer(TOKENIZER.encoding)
    whole = broken._core
    broken._core = type("Short", (), {"encode_flat": staticmethod(lambda text: whole.encode_flat(text)[:-4])})
    difference = broken.difference("hello world")
    expected = TOKENIZER.encode("hello world").tolist()[1:]
    assert (
        difference is not None
        and f"at token 1 of a text of 11 characters, about 'hello world': expected {expected}" in difference
    )
    assert difference.endswith("got []; leave encoder out: tiktoken is exact")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_wrong_id_is_noticed_while_running_and_never_skipped(workers, monkeypatch):
    # construction sees only the sample
    break_core(monkeypatch, lambda text: "number 7" in text)
    chats = [
        [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": "Yes."}] for i in range(4000)
    ]
    monkeypatch.setattr(fast, "SPOT_CHECK", 5)
    with (
        Loader(chats, TOKENIZER, encoder="fast", num_workers=workers, on_error="skip", **SMALL) as loader,
        pytest.raises(EncoderError, match=r"differs from tiktoken at token \d+ of a text of .* about 'number 7"),
    ):
        list(loader)


def test_one_text_in_a_thousand_is_compared_starting_with_the_first(monkeypatch):
    tokenizer, seen = FastTokenizer(TOKENIZER.encoding), []
    monkeypatch.setattr(FastTokenizer, "_compare", lambda self, text, ids: seen.append((text, ids.tolist())))
    texts = iter(str(number) for number in range(5000))
    for size in itertools.cycle([1, 7, 0, 2100]):
        if not (batch := list(itertools.islice(texts, size))) and size:
            break
        tokenizer.encode_batch(batch)
    assert seen == [(str(number), TOKENIZER.encode(str(number)).tolist()) for number in range(0, 5000, 1000)]


def test_construction_compares_a_small_sample_and_passes_over_bad_conversations(monkeypatch):
    class Counting:
        def __init__(self) -> None:
            self.read: list[int] = []

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> object:
            self.read.append(index)
            return {"text": "a " * 100_000} if index else {"messages": "bad"}

    texts: list[str] = []
    monkeypatch.setattr(fast, "SAMPLE_SECONDS", 60)
    monkeypatch.setattr(FastTokenizer, "difference", lambda self, text: texts.append(text))
    source = Counting()
    choose_encoder("fast", TOKENIZER, open_conversations(source))
    assert source.read[:2] == [0, 143] and len(source.read) <= fast.SAMPLE
    assert max(map(len, texts)) == fast.SAMPLE_TEXT
    assert sum(map(len, texts)) <= fast.SAMPLE_CHARACTERS + fast.SAMPLE_TEXT


# The batches


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_batches_are_the_reference_packers_which_tiktoken_encodes(workers):
    for packing in ("best_fit", "stream"):
        found = nanopack.verify(CHATS, TOKENIZER, encoder="fast", num_workers=workers, packing=packing, **SMALL)
        assert found and found.batches > 5, found.difference


def test_the_shipped_conversations_give_the_same_batches_with_both_encoders():
    with (
        Loader(SHIPPED, "chat32k", epochs=1, encoder="fast", num_workers=0) as ours,
        Loader(SHIPPED, "chat32k", epochs=1) as its,
    ):
        found = compare(its, ours)
    assert found, found.difference


def test_a_run_resumes_with_the_other_encoder():
    expected = list(itertools.islice(reference.batches(CHATS, TOKENIZER, **SMALL), 6))
    for before, after in ((None, "fast"), ("fast", None)):
        with Loader(CHATS, TOKENIZER, encoder=before, num_workers=0, **SMALL) as loader:
            for _ in range(3):
                next(loader)
            state = json.loads(json.dumps(loader.state_dict()))
        with Loader(CHATS, TOKENIZER, encoder=after, num_workers=0, **SMALL) as loader:
            loader.load_state_dict(state)
            assert compare(iter(expected[3:]), itertools.islice(loader, 3))


def test_a_loaders_tokenizer_stays_tiktokens_and_explains_as_before():
    with Loader(CHATS, TOKENIZER, encoder="fast", num_workers=0, **SMALL) as loader:
        assert loader.tokenizer is TOKENIZER
        batch = next(loader)
        fast_says = str(loader.explain(batch, 0, 5))
    with Loader(CHATS, TOKENIZER, num_workers=0, **SMALL) as loader:
        assert str(loader.explain(next(loader), 0, 5)) == fast_says


def test_its_fingerprint_is_tiktokens():
    assert FAST.fingerprint() == TOKENIZER.fingerprint()


# Processes


def test_it_pickles_and_is_itself_again_where_it_was_spawned():
    again = pickle.loads(pickle.dumps(FAST))
    assert type(again) is FastTokenizer
    assert again.encode("naïve").tolist() == TOKENIZER.encode("naïve").tolist()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        expected = TOKENIZER.encode("naïve <|bos|>").tolist()
        assert pool.apply_async(FastTokenizer.encode, (FAST, "naïve <|bos|>")).get(60).tolist() == expected


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_forked_while_threads_encode_does_not_hang():
    stop = threading.Event()

    def work() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            FAST.encode_batch([f"naïve words, {number} of them, " * 20])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        context = multiprocessing.get_context("fork")
        for _ in range(10):
            receive, send = context.Pipe(duplex=False)
            child = context.Process(target=lambda send=send: send.send(FAST.encode("naïve <|bos|>")))
            child.start()
            try:
                assert receive.poll(30), "the forked process hangs"
                assert receive.recv().tolist() == TOKENIZER.encode("naïve <|bos|>").tolist()
            finally:
                child.kill()
                child.join()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# The command line


def test_the_command_line_takes_the_encoder(capsys, monkeypatch):
    assert cli.main(["verify", "--encoder", "fast", "--max-batches", "2", "--batch-size", "2", "--seq-len", "128"]) == 0
    assert "equal to the reference packer in every field" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "splintr", None)
    assert cli.main(["pack", "--encoder", "fast"]) == 2
    assert capsys.readouterr().err == "nanopack: encoder='fast' needs splintr-rs; pip install nanopack-gpu[fast]\n"


def test_what_tiktoken_refuses_is_refused_by_the_comparison_too():
    """By a pattern that does not match everything tiktoken refuses shorter texts, which splintr-rs encodes."""
    tokenizer = FastTokenizer(encoding(r" ?\p{L}++| ?\p{N}++|\s++$|\s+(?!\S)"))
    with pytest.raises(ValueError, match="tiktoken cannot encode this text of 200,001 characters"):
        tokenizer.encode("=" * 200_000 + "a")
