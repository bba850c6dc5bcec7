"""Promises of nanopack/tokenizers/byte_level.py: tiktoken gives a byte-level BPE's own ids, or is not used."""

from __future__ import annotations

import json
import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from nanopack import EncoderError, Loader, verify
from nanopack.conversations.records import check
from nanopack.errors import TemplateError
from nanopack.render.renderer import Renderer
from nanopack.tokenizers import huggingface
from nanopack.tokenizers.byte_tables import parse
from nanopack.tokenizers.splintr import choose_encoder
from nanopack.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from fuzz_texts import PIECES, TEXTS, fuzz
from split_patterns import O200K, PATTERNS
from tiny_hf import MARKED, PLAIN, make_core, make_tokenizer, shipped

NUMBERS = r"\p{N}{1,3}"
DEEPSEEK = [
    NUMBERS,
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
]
TEKKEN = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")


def settings_of(core: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(core.to_str())
    return found


def remade(changed: dict[str, Any]) -> Any:
    return type(make_core()).from_str(json.dumps(changed))


def trained(*patterns: str, digits: bool = False, normalizer: str | None = None) -> Any:
    """Return a byte-level BPE trained here, whose texts are split by these patterns, one after the other."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    if normalizer:
        core.normalizer = getattr(normalizers, normalizer)()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|endoftext|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [message["content"] for record in shipped(400) for message in record["messages"]]
    core.train_from_iterator([*texts, "12 123 4567 漢字かなー です ｡ It's I'LL \r\n\r\n  x\n\n= 1" * 20], trainer)
    core.add_tokens([AddedToken("<think>", special=False), AddedToken("<b>", lstrip=True, rstrip=True)])
    return core


HOW = {
    "gpt2": {},
    "digits apart": {"digits": True},
    "llama3": {"patterns": [PATTERNS["llama3"]]},
    "qwen2": {"patterns": [PATTERNS["qwen2"]], "normalizer": "NFC"},
    "o200k": {"patterns": [O200K]},
    "tekken": {"patterns": [TEKKEN]},
    "deepseek": {"patterns": DEEPSEEK},
    "NFKC": {"normalizer": "NFKC"},
}
CORES: dict[str, Any] = {}


def make(how: str) -> Any:
    if how not in CORES:
        arguments = dict(HOW[how])
        CORES[how] = trained(*arguments.pop("patterns", ()), **arguments)
    return CORES[how]


def exact(core: Any, text: str) -> list[int]:
    """What tokenizers itself makes of a text in which special tokens are text."""
    copy = type(core).from_str(core.to_str())
    copy.encode_special_tokens = True
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids: list[int] = copy.encode(mended, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("how", HOW)
def test_ids_are_the_tokenizers_own_on_texts_on_which_encoders_may_differ(how):
    core = make(how)
    tokenizer = load_tokenizer(core)
    assert tokenizer.encoder == "tiktoken"
    texts = list(fuzz(load_tokenizer("chat32k")))
    ids, offsets = tokenizer.encode_batch(texts)
    copy = type(core).from_str(core.to_str())
    copy.encode_special_tokens = True
    for place, text in enumerate(texts):
        mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        expected = copy.encode(mended, add_special_tokens=False).ids
        assert ids[offsets[place] : offsets[place + 1]].tolist() == expected, ascii(text[:100])


@pytest.mark.parametrize("how", ["qwen2", "deepseek"])
@given(text=TEXTS)
def test_ids_are_the_tokenizers_own_on_any_text(how, text):
    core = make(how)
    for one in (text, f"{text} <b> <think>{text}<|im_end|>"):
        assert load_tokenizer(core).encode(one).tolist() == exact(core, one)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_ids_and_masks_of_20000_messages_in_chats_are_those_of_the_tokenizers_core(how):
    chance, core = random.Random(how), make(how)
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = make_tokenizer(PLAIN, tokenizer_object=core)
    renderer = Renderer(load_tokenizer(tokenizer), "hf")
    real = [message["content"] for record in shipped(400) for message in record["messages"]]
    pieces = [piece for piece in (*PIECES, "\r\n\r\n", "\u0344", "\u1100\u1161", "w" * 900) if "<|" not in piece]
    for _ in range(10_000):
        fuzzed = "".join(chance.choices(pieces, k=chance.randrange(1, 16)))
        question, answer = chance.sample((chance.choice(real), fuzzed), 2)
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        document = renderer(check({"messages": chat}))
        mended = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in (question, answer)]
        before = f"<|im_start|>user\n{mended[0]}<|im_end|>\n<|im_start|>assistant\n"
        end = len(before) + len(f"{mended[1]}<|im_end|>")
        encoding = core.encode(f"{before}{mended[1]}<|im_end|>\n", add_special_tokens=False)
        assert document.ids.tolist() == encoding.ids, ascii(chat)
        assert document.mask.tolist() == [b > len(before) and a < end for a, b in encoding.offsets], ascii(chat)


def test_each_token_has_the_bytes_of_its_text():
    tokenizer = load_tokenizer(make("qwen2"))
    for text in ("Hello  there\n", "漢字 😀 naïve", " 12 = 3 "):
        sizes = tokenizer.byte_level.num_bytes[tokenizer.encode(text)]
        assert sizes.sum() == len(text.encode())
        assert sizes.all()


def test_ids_in_another_order_than_merges_are_mapped():
    changed = settings_of(make("gpt2"))
    vocab = changed["model"]["vocab"]
    first = changed["added_tokens"][1]["id"] + 1
    turned = {
        token: (len(vocab) - 1 + first - number if number >= first else number) for token, number in vocab.items()
    }
    changed["model"]["vocab"] = turned
    changed["added_tokens"] = changed["added_tokens"][:2]
    tokenizer = load_tokenizer(remade(changed))
    assert tokenizer.encoder == "tiktoken"
    text = "The quick brown fox is in the house, isn't it?"
    straight = load_tokenizer(make("gpt2")).encode(text)
    assert tokenizer.encode(text).tolist() == (len(vocab) - 1 + first - straight.astype(int)).tolist()


def test_a_token_that_no_merges_make_is_left_out_unless_merges_are_ignored():
    changed = settings_of(make("gpt2"))
    # The bytes of 'thequick' merge, but not to this.
    changed["model"]["vocab"]["qzqz"] = number = max(t["id"] for t in changed["added_tokens"]) + 1
    for ignore_merges in (False, True):
        changed["model"]["ignore_merges"] = ignore_merges
        core = remade(changed)
        tokenizer = load_tokenizer(core)
        assert tokenizer.encoder == "tiktoken"
        for text in ("qzqz", "aqzqz", "qzqz qzqz", "qzqzqzqz"):
            assert tokenizer.encode(text).tolist() == exact(core, text)
        assert (number in tokenizer.encode("qzqz")) == ignore_merges


def test_merges_of_the_marks_that_json_writes_them_with_are_read_as_they_are():
    from tokenizers import Tokenizer, models, pre_tokenizers

    merges = [("]", ","), ("],", "["), ('"', ","), ('",', '"'), ("\\", '"'), ("\\", "\\"), ('","', '],["'), ('["', "]")]
    letters = pre_tokenizers.ByteLevel.alphabet()
    words = [*letters, '["', '],["', *map("".join, merges)]
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    _, _, made = parse(core.to_str())
    assert made == ["".join(pair) for pair in merges]


def without_some_merges() -> dict[str, Any]:
    changed = settings_of(make("gpt2"))
    # 'ing' stays a token, which no merge makes: tiktoken would make it all the same.
    changed["model"]["merges"] = [pair for pair in changed["model"]["merges"] if "".join(pair) != "ing"]
    return changed


def twice() -> dict[str, Any]:
    """A token is made once more, of two others, by the last merge."""
    changed = settings_of(make("gpt2"))
    merges, vocab = changed["model"]["merges"], changed["model"]["vocab"]
    splits = ([word[:at], word[at:]] for word in map("".join, merges) for at in range(1, len(word)))
    merges.append(next(pair for pair in splits if pair not in merges and all(part in vocab for part in pair)))
    return changed


def with_other(part: str, **values: Any) -> dict[str, Any]:
    changed = settings_of(make("gpt2"))
    changed[part] = {**(changed[part] or {}), **values}
    return changed


OTHERS = {
    "normalizer Lowercase": (with_other("normalizer", type="Lowercase"), "its normalizer is Lowercase"),
    "prefix space": (
        with_other(
            "pre_tokenizer",
            pretokenizers=[{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}],
        ),
        "does not end with ByteLevel(add_prefix_space=False)",
    ),
    "dropout": (with_other("model", dropout=0.5), "its dropout is 0.5"),
    "merges twice": (twice(), "its merges make a token in two places"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_might_differ_is_encoded_by_the_tokenizer_itself_and_the_reason_is_given(case):
    changed, why = OTHERS[case]
    tokenizer = load_tokenizer(remade(changed))
    assert tokenizer.encoder.startswith("tokenizers: ") and why in tokenizer.encoder
    with Loader([{"text": "Hi."}], remade(changed), 1, 64, num_workers=0) as loader:
        assert loader.stats()["encoder"] == tokenizer.encoder


def test_a_token_whose_merge_was_taken_out_is_never_made():
    core = remade(without_some_merges())
    tokenizer = load_tokenizer(core)
    for text in ("ing", " seeing things", "xing"):
        assert tokenizer.encode(text).tolist() == exact(core, text)


def test_a_pattern_that_is_not_known_is_not_rewritten():
    tokenizer = load_tokenizer(trained(r"\p{L}+|[^\p{L}]+"))
    assert tokenizer.encoder.startswith("tokenizers: '\\\\p{L}+' of its split pattern")
    assert tokenizer.encode("a1b").tolist() == exact(tokenizer.core.given, "a1b")


def test_a_text_that_is_not_normal_and_a_very_long_one_are_encoded_by_the_tokenizer_itself():
    core = make("qwen2")
    tokenizer = load_tokenizer(core)
    assert not tokenizer.byte_level.takes(["e\u0301"])
    assert not tokenizer.byte_level.takes(["a" * 250_000])
    assert tokenizer.byte_level.takes(["é", "漢字"])
    texts = ["e\u0301", "ok", " " * 300_000]
    ids, offsets = tokenizer.encode_batch(texts)
    for place, text in enumerate(texts):
        assert ids[offsets[place] : offsets[place + 1]].tolist() == exact(core, text)


def test_a_tokenizer_that_is_cut_short_by_its_owner_later_is_still_compared_whole():
    given_one = make_tokenizer()
    tokenizer = load_tokenizer(given_one)
    text = "one two three four"
    whole = tokenizer.encode(text).tolist()
    given_one(text, truncation=True, max_length=2)
    assert given_one.backend_tokenizer.truncation
    assert tokenizer.encode_exactly([text])[0] == whole == tokenizer.encode(text).tolist()


def test_one_text_in_a_thousand_is_compared_starting_with_the_first(monkeypatch):
    tokenizer, seen = load_tokenizer(make("gpt2")), []
    monkeypatch.setattr(huggingface, "describe_difference", lambda text, *ids: seen.append(text))
    texts = map(str, range(5000))
    for size in (1, 7, 0, 1992, 1, 999, 2000):
        tokenizer.encode_batch([b"", *islice(texts, size)])
    assert seen == ["0", "1000", "2000", "3000", "4000"]


@pytest.mark.parametrize("number", [0, 7])
def test_a_difference_found_while_it_runs_stops_the_run_with_the_text_and_both_ids(monkeypatch, number):
    monkeypatch.setattr(huggingface, "SPOT_CHECK", 10)
    tokenizer = load_tokenizer(make("gpt2"))
    tokenizer._encoded = 10 - number
    texts = [f"text {n}" for n in range(number + 1)]
    tokenizer.encode_batch(texts)
    tokenizer._encoded = 10 - number
    monkeypatch.setattr(tokenizer.core, "encode", lambda texts: [[1, 2] for _ in texts])
    with pytest.raises(
        EncoderError, match=rf"token 0 of the text 'text {number}': expected \[1, 2\], got \[.*report it"
    ):
        tokenizer.encode_batch(texts)


def test_a_difference_found_at_construction_leaves_it_to_the_tokenizer(monkeypatch):
    from nanopack.tokenizers import byte_level

    monkeypatch.setattr(byte_level, "of_pre_tokenizer", lambda settings: r"[\s\S]")
    tokenizer = load_tokenizer(make_core())
    assert tokenizer.encoder.startswith("tokenizers: the ids differ from the tokenizer's own at token ")
    assert np.array_equal(tokenizer.encode("The end"), exact(make_core(), "The end"))


# encoder="fast"


def fast(how: str) -> Any:
    pytest.importorskip("splintr", reason="needs splintr-rs: pip install 'nanopack-gpu[fast]'")
    return choose_encoder("fast", load_tokenizer(make(how)), [])


@pytest.mark.parametrize("how", ["gpt2", "llama3", "qwen2", "o200k"])
def test_splintr_gives_the_tokenizers_own_ids_on_texts_on_which_encoders_may_differ(how):
    tokenizer, core = fast(how), make(how)
    assert tokenizer.encoder == "splintr-rs"
    texts = [*fuzz(load_tokenizer("chat32k")), "a <think> b<b> c <|im_end|>\u180e\u2c2f \U0001fae9 x" * 3]
    ids, offsets = tokenizer.encode_batch(texts)
    for place, text in enumerate(texts):
        assert ids[offsets[place] : offsets[place + 1]].tolist() == exact(core, text), ascii(text[:100])


def test_the_batches_are_those_of_the_tokenizer_itself_and_stats_name_the_encoder():
    chats = shipped(40)
    tokenizer = make_tokenizer(MARKED, tokenizer_object=make("qwen2"))
    for template in ("hf", "chatml"):
        arguments = {"batch_size": 2, "seq_len": 256, "template": template, "epochs": 1, "encoder": "fast"}
        try:
            with Loader(chats, tokenizer, num_workers=2, **arguments) as loader:
                assert loader.stats()["encoder"] == "splintr-rs"
        except TemplateError:
            # chatml has a token that this tokenizer lacks
            assert template == "chatml"
            continue
        assert verify(chats, tokenizer, **arguments)


@pytest.mark.parametrize("how", ["deepseek", "tekken"])
def test_a_pattern_that_splintr_is_not_known_to_split_alike_is_refused_by_the_tokenizers_name(how):
    with pytest.raises(ValueError, match=r"encoder='fast' cannot take 'Tokenizer': .* leave encoder out"):
        fast(how)


def test_a_tokenizer_that_tiktoken_cannot_encode_is_refused_with_the_reason():
    settings = settings_of(make("gpt2"))
    settings["model"]["dropout"] = 0.1
    with pytest.raises(ValueError, match=r"is encoded by tokenizers: its dropout is 0.1; leave encoder out"):
        choose_encoder("fast", load_tokenizer(remade(settings)), [])


def test_a_difference_of_splintrs_stops_the_run(monkeypatch):
    tokenizer = fast("gpt2")
    encode = tokenizer.byte_level._encode_texts

    def wrong(texts):
        return [b"\1\0\0\0" if text == "ab" else ids for text, ids in zip(texts, encode(texts), strict=True)]

    monkeypatch.setattr(tokenizer.byte_level, "_encode_texts", wrong)
    with pytest.raises(EncoderError, match="at token 0 of the text 'ab'"):
        tokenizer.encode_batch(["ab"])
