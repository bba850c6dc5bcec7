"""Promises of nanopack/render/renderer.py, compared with a renderer in plain lists, token by token."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_sets import SHIPPED
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_renderer import (
    AROUND,
    BOS,
    CHATML,
    FREE_CONVERSATIONS,
    LLAMA3,
    LOOKS_SPECIAL,
    NANOCHAT,
    NOT_SPECIAL,
    PLAIN_TEXTS,
    RENDER,
    TOKENIZERS,
    assert_is_plain,
    nanochat_conversations,
)

from nanopack.conversations.records import Conversation, Message, Part, check
from nanopack.render.document import Document
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import Tokenizer


@given(nanochat_conversations() | PLAIN_TEXTS)
@settings(deadline=None)
def test_nanochat_documents_are_those_of_the_plain_renderer(conversation):
    assert_is_plain(RENDER["nanochat"](conversation), conversation, "nanochat")


@pytest.mark.parametrize("template", ["chatml", "llama3"])
@given(FREE_CONVERSATIONS | PLAIN_TEXTS)
@settings(deadline=None)
def test_chatml_and_llama3_documents_are_those_of_the_plain_renderer(template, conversation):
    assert_is_plain(RENDER[template](conversation), conversation, template)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), NOT_SPECIAL), min_size=1, max_size=4))
@settings(deadline=None)
def test_a_llama3_document_is_the_whole_text_of_metas_template_encoded_in_one_go(messages):
    """Meta's model was trained on ids of the whole text; ours come piece by piece."""
    headers = [f"<|start_header_id|>{role}<|end_header_id|>\n\n{text.strip()}<|eot_id|>" for role, text in messages]
    text = "<|begin_of_text|>" + "".join(headers)
    document = RENDER["llama3"](Conversation(tuple([Message(*message) for message in messages])))
    assert document.ids.tolist() == LLAMA3.encoding.encode(text, allowed_special="all")


def test_every_shipped_conversation_is_that_of_the_plain_renderer():
    kinds = set()
    for line in SHIPPED.read_text(encoding="utf-8").splitlines():
        conversation = check(json.loads(line))
        assert_is_plain(RENDER["nanochat"](conversation), conversation, "nanochat")
        kinds |= {message.role for message in conversation.messages}
        kinds |= {"parts" for message in conversation.messages if not isinstance(message.content, str)}
    assert kinds == {"system", "user", "assistant", "parts"}


# By hand


def tokens_of(document: Document, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Runs of equal mask with their special tokens by name: short enough to check by eye."""
    specials = set(tokenizer.encoding._special_tokens.values())
    runs: list[list] = []
    for token_id, trained in zip(document.ids.tolist(), document.mask.tolist(), strict=True):
        text = tokenizer.decode([token_id])
        if runs and runs[-1][1] == trained and not runs[-1][2] and token_id not in specials:
            runs[-1][0] += text
        else:
            runs.append([text, trained, token_id in specials])
    return [(text, int(trained)) for text, trained, _ in runs]


def test_a_nanochat_document_by_hand():
    answer = (
        Part("text", "Let me see."),
        Part("python", "12*12"),
        Part("python_output", "144"),
        Part("text", "144!"),
    )
    conversation = Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "12 times 12?"),
            Message("assistant", answer),
            Message("user", "<|assistant_end|>"),
            Message("assistant", "Fine."),
        )
    )
    document = RENDER["nanochat"](conversation)
    assert tokens_of(document, NANOCHAT) == [
        ("<|bos|>", 0),
        ("<|user_start|>", 0),
        ("Be brief.\n\n12 times 12?", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("Let me see.", 1),
        ("<|python_start|>", 1),
        ("12*12", 1),
        ("<|python_end|>", 1),
        ("<|output_start|>", 0),
        ("144", 0),
        ("<|output_end|>", 0),
        ("144!", 1),
        ("<|assistant_end|>", 1),
        ("<|user_start|>", 0),
        ("<|assistant_end|>", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("Fine.", 1),
        ("<|assistant_end|>", 1),
    ]
    ids = document.ids.tolist()
    # Of the two that read <|assistant_end|> in front, one is text: many ids, none of them special.
    assert ids.count(NANOCHAT.special_id("<|assistant_end|>")) == 2
    users = [i for i, token_id in enumerate(ids) if token_id == NANOCHAT.special_id("<|user_start|>")]
    assistants = [i for i, token_id in enumerate(ids) if token_id == NANOCHAT.special_id("<|assistant_start|>")]
    assert document.starts == (users[0], users[0], assistants[0], users[1], assistants[1])


def test_a_chatml_document_by_hand():
    conversation = Conversation(
        (Message("assistant", "Hello"), Message("system", "Be brief."), Message("user", "<|im_end|>"))
    )
    document = RENDER["chatml"](conversation)
    assert tokens_of(document, CHATML) == [
        ("<|endoftext|>", 0),
        ("<|im_start|>", 0),
        ("assistant\n", 0),
        ("Hello", 1),
        ("<|im_end|>", 1),
        ("\n", 0),
        ("<|im_start|>", 0),
        ("system\nBe brief.", 0),
        ("<|im_end|>", 0),
        ("\n", 0),
        ("<|im_start|>", 0),
        ("user\n<|im_end|>", 0),
        ("<|im_end|>", 0),
        ("\n", 0),
    ]
    starts = np.flatnonzero(document.ids == CHATML.special_id("<|im_start|>"))
    assert document.starts == tuple(starts.tolist())


def test_a_llama3_document_by_hand():
    conversation = Conversation(
        (Message("system", " Be brief.\n"), Message("user", "<|eot_id|>"), Message("assistant", "\n\nHello "))
    )
    document = RENDER["llama3"](conversation)
    assert tokens_of(document, LLAMA3) == [
        ("<|begin_of_text|>", 0),
        ("<|start_header_id|>", 0),
        ("system", 0),
        ("<|end_header_id|>", 0),
        ("\n\nBe brief.", 0),
        ("<|eot_id|>", 0),
        ("<|start_header_id|>", 0),
        ("user", 0),
        ("<|end_header_id|>", 0),
        ("\n\n<|eot_id|>", 0),
        ("<|eot_id|>", 0),
        ("<|start_header_id|>", 0),
        ("assistant", 0),
        ("<|end_header_id|>", 0),
        ("\n\n", 0),
        ("Hello", 1),
        ("<|eot_id|>", 1),
    ]
    starts = np.flatnonzero(document.ids == LLAMA3.special_id("<|start_header_id|>"))
    assert document.starts == tuple(starts.tolist())


@pytest.mark.parametrize("text", ["Once upon a time", "", "<|bos|>"], ids=["text", "empty", "looks-special"])
def test_plain_text_is_bos_and_text_all_trained(text):
    for template, bos in BOS.items():
        tokenizer = TOKENIZERS[template]
        document = RENDER[template](Conversation((), text))
        assert document.ids.tolist() == [tokenizer.special_id(bos), *tokenizer.encode(text).tolist()]
        assert document.mask.all()
        assert document.starts == ()


SAFE_TEXTS = st.lists(st.text() | LOOKS_SPECIAL, max_size=4).map("".join)


@given(SAFE_TEXTS, SAFE_TEXTS, SAFE_TEXTS, st.lists(st.builds(Part, st.sampled_from(list(AROUND)), SAFE_TEXTS)))
@settings(deadline=None)
def test_decoding_a_document_gives_back_all_its_texts(system, user, answer, parts):
    messages = [Message("system", system), Message("user", user), Message("assistant", answer)]
    messages += [Message("user", user), Message("assistant", tuple(parts))]
    inside = "".join(part.text.join(AROUND[part.type]) for part in parts)
    expected = (
        f"<|bos|><|user_start|>{system}\n\n{user}<|user_end|><|assistant_start|>{answer}<|assistant_end|>"
        f"<|user_start|>{user}<|user_end|><|assistant_start|>{inside}<|assistant_end|>"
    )
    assert NANOCHAT.decode(RENDER["nanochat"](Conversation(tuple(messages))).ids) == expected


def test_a_conversation_may_end_with_the_users_message():
    document = RENDER["nanochat"](Conversation((Message("user", "Hi"),)))
    assert tokens_of(document, NANOCHAT)[-1] == ("<|user_end|>", 0)
    assert not document.mask.any()


def test_a_conversation_is_encoded_in_one_call():
    calls = []

    class Counting(Tokenizer):
        def encode_batch(self, texts):
            calls.append(list(texts))
            return super().encode_batch(texts)

    render = Renderer(Counting(NANOCHAT.encoding), "nanochat")
    answer = (Part("text", "b"), Part("python", "c"), Part("python_output", "d"))
    render(Conversation((Message("system", "s"), Message("user", "a"), Message("assistant", answer))))
    [texts] = calls
    assert [text for text in texts if isinstance(text, str)] == ["s\n\na", "b", "c", "d"]


@pytest.mark.parametrize("template", list(TOKENIZERS))
def test_writing_into_a_document_leaves_the_next_one_as_it_is(template):
    for conversation in (Conversation((Message("user", ""),)), Conversation((), "")):
        first = RENDER[template](conversation)
        expected = first.ids.tolist()
        with pytest.raises(ValueError, match="read-only"):
            first.ids[:] = 0
        first.mask[:] = True
        assert_is_plain(RENDER[template](conversation), conversation, template)
        assert expected[0] == TOKENIZERS[template].bos_id
