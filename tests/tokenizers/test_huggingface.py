"""Promises of nanopack/tokenizers/huggingface.py: a Hugging Face tokenizer does what a tiktoken one does."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from covering import each
from hypothesis import given
from hypothesis import strategies as st

from nanopack import verify
from nanopack.render.templates import CHATML
from nanopack.tokenizers.tokenizer import AnyTokenizer, load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from tiny_hf import SPECIAL_TOKENS, make_core, make_tokenizer, shipped

CORE = make_core()
BARE = load_tokenizer(CORE)
FAST = load_tokenizer(make_tokenizer())
BOTH = {"tokenizers": BARE, "transformers": FAST}
NAMES = list(BOTH)
LOOKS_SPECIAL = st.sampled_from([*SPECIAL_TOKENS, "<|im_", "|>"])
TEXTS = st.lists(st.text() | LOOKS_SPECIAL, max_size=4).map("".join)


@pytest.mark.parametrize("name", NAMES)
@given(st.lists(TEXTS))
def test_a_batch_is_each_text_alone_as_the_tokenizer_encodes_it_with_special_tokens_split(name, texts):
    tokenizer = BOTH[name]
    ids, offsets = tokenizer.encode_batch(texts)
    assert (ids.dtype, offsets.dtype, offsets.shape) == (np.uint32, np.int64, (len(texts) + 1,))
    assert (offsets[0], offsets[-1]) == (0, len(ids))
    slow = make_tokenizer()
    for i, text in enumerate(texts):
        expected = slow(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids[offsets[i] : offsets[i + 1]].tolist() == expected == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_text_that_looks_like_a_special_token_stays_text(name, token):
    tokenizer = BOTH[name]
    ids = tokenizer.encode(f"a{token}b").tolist()
    assert tokenizer.special_id(token) not in ids
    assert tokenizer.decode(ids) == f"a{token}b"
    # Without this the promise would be empty.
    assert tokenizer.special_id(token) in CORE.encode(f"a{token}b").ids


def test_a_token_that_was_added_without_being_special_is_found_in_text():
    assert FAST.encode("<think>").tolist() == [CORE.token_to_id("<think>")]
    assert "<think>" not in FAST.special_tokens


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_put_around_a_text_and_nothing_is_cut(name):
    from tokenizers import Tokenizer, processors

    core = Tokenizer.from_str(CORE.to_str())
    core.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    core.enable_truncation(2)
    core.enable_padding(length=9)
    given_one = core if name == "tokenizers" else make_tokenizer(tokenizer_object=core)
    tokenizer = load_tokenizer(given_one)
    assert tokenizer.encode("one two three").tolist() == BARE.encode("one two three").tolist()
    assert len(core.encode("one two three").ids) == 9


@pytest.mark.parametrize("text", ["a\ud800b", "\udc00\ud800", "\ud83d\ude00"])
def test_lone_surrogates_become_the_replacement_character(text):
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert FAST.encode(text).tolist() == FAST.encode(mended).tolist()
    ids, offsets = FAST.encode_batch(["x", text, "y"])
    assert ids[offsets[1] : offsets[2]].tolist() == FAST.encode(mended).tolist()


def test_what_was_given_is_left_as_it_was():
    given_one = make_tokenizer()
    before = given_one.backend_tokenizer.to_str()
    load_tokenizer(given_one).encode("<|im_end|>")
    assert given_one.backend_tokenizer.to_str() == before
    assert given_one.backend_tokenizer.encode_special_tokens is False


@pytest.mark.parametrize("name", NAMES)
def test_special_text_is_still_text_on_the_other_side_of_a_process_boundary(name):
    back: AnyTokenizer = pickle.loads(pickle.dumps(BOTH[name]))
    assert back.encode("<|im_end|>").tolist() == BARE.encode("<|im_end|>").tolist()
    assert (back.vocab_size, back.bos_id, back.name) == (BOTH[name].vocab_size, BOTH[name].bos_id, BOTH[name].name)


def test_names_and_numbers():
    assert (BARE.name, FAST.name) == ("Tokenizer", type(make_tokenizer()).__name__)
    assert load_tokenizer(make_tokenizer(name_or_path="me/mine")).name == "me/mine"
    assert BARE.vocab_size == FAST.vocab_size == 1001
    assert FAST.special_tokens == set(SPECIAL_TOKENS)
    assert [FAST.special_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"no special token '<think>'; it has: <\|endoftext\|>, "):
        FAST.special_id("<think>")


@pytest.mark.parametrize(
    ("settings", "bos"),
    [({}, "<|endoftext|>"), ({"bos_token": "<|im_start|>"}, "<|im_start|>")],
    ids=["by-name", "its-own"],
)
def test_bos_is_the_tokenizers_own_else_found_by_name(settings, bos):
    tokenizer = load_tokenizer(make_tokenizer(**settings))
    assert tokenizer.bos_id == tokenizer.special_id(bos)


def test_a_tokenizer_without_a_beginning_of_sequence_is_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match=r"tokenizer 'Tokenizer' has no bos_token, and none of <\|bos\|>, .*<s>"):
        load_tokenizer(Tokenizer(models.BPE()))


def test_special_ids_decode_to_their_names_and_what_is_no_id_is_refused():
    assert FAST.decode([0, 1, 2]) == "".join(SPECIAL_TOKENS)
    assert FAST.decode(FAST.encode(" naïve\n")) == " naïve\n"
    for wrong in ([1001], [-1], [[1]], [1.5]):
        with pytest.raises(ValueError, match=r"cannot decode these ids; give a flat .* 0 to 1000"):
            FAST.decode(wrong)


def test_an_id_that_is_not_used_does_not_vanish_from_a_text():
    from tokenizers import Tokenizer, models

    core = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 9}, unk_token="a"))
    core.add_special_tokens(["<s>"])
    tokenizer = load_tokenizer(core)
    assert tokenizer.decode([1, 9]) == "a b"
    with pytest.raises(ValueError, match="cannot decode these ids"):
        tokenizer.decode([1, 5, 9])


def test_a_fingerprint_tells_of_all_that_decides_ids_and_of_nothing_else():
    same = [
        make_tokenizer(),
        make_tokenizer(name_or_path="elsewhere", model_max_length=7),
        pickle.loads(pickle.dumps(FAST)),
    ]
    assert {load_tokenizer(tokenizer).fingerprint() for tokenizer in same} == {FAST.fingerprint()}
    more = make_tokenizer()
    more.add_tokens(["<tool>"], special_tokens=True)
    others = [make_tokenizer(chat_template="{{ messages }}"), make_tokenizer(bos_token="<|im_start|>"), more]
    assert len({load_tokenizer(tokenizer).fingerprint() for tokenizer in [*same, *others]}) == 4


def test_nanochats_object_and_a_loaded_one_are_accepted():
    assert load_tokenizer(SimpleNamespace(tokenizer=CORE)).encode("hi").tolist() == BARE.encode("hi").tolist()
    assert load_tokenizer(FAST) is FAST


EDGES = [
    {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": " <think> \ud800"}]},
    {"text": "<|endoftext|>"},
]


@pytest.mark.parametrize(
    ("name", "workers", "template"), each(NAMES, [0, 1, 2], {"by-name": "chatml", "as-an-object": CHATML})
)
def test_batches_are_the_reference_packers(name, workers, template):
    arguments = {"batch_size": 2, "seq_len": 256, "num_workers": workers, "template": template}
    found = verify([*EDGES, *shipped(60)], BOTH[name], **arguments)
    assert found, found.difference
    assert found.tokens > 4000
