"""What a template forbids, and what cannot be rendered, is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from plain_renderer import CHATML, DATA, NANOCHAT, RENDER

from nanopack.conversations.records import Conversation, Message, Part, check
from nanopack.errors import ConversationError, TemplateError
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import from_ranks

S, U, A = (Message(role, f"I am {role}") for role in ("system", "user", "assistant"))
PARTED = {role: Message(role, (Part("text", "p"), Part("python", "1"))) for role in ("system", "user", "assistant")}
SPACES = " " * 1_000_001
ALTERNATE = "messages must alternate user/assistant after an optional system message"
NOT_FIRST = f"where the first user message must be; {ALTERNATE}; first_assistant='drop' or 'empty_user' helps"
PARTS_OF = "content has parts that are not text; for role"
REFUSED = "tiktoken cannot encode this text of 1,000,001 characters"
FORBIDDEN = {
    "no-messages": ([], "there are no messages; a conversation needs at least one"),
    "only-system": ([S], "message 0: role is 'system' and no message follows; a user's must"),
    "starts-with-assistant": ([A, U], f"message 0: role is 'assistant' {NOT_FIRST}"),
    "assistant-after-system": ([S, A, U], f"message 1: role is 'assistant' {NOT_FIRST}"),
    "assistant-twice": ([U, A, A], f"message 2: role is 'assistant' twice in a row; {ALTERNATE}"),
    "assistant-twice-late": ([S, U, A, U, A, A], "message 5: role is 'assistant' twice in a row"),
    "user-twice": ([U, U], f"message 1: role is 'user' twice in a row; {ALTERNATE}"),
    "user-twice-after-system": ([S, U, U], "message 2: role is 'user' twice in a row"),
    "system-twice": ([S, S, U], "message 1: role is 'system'; only message 0 may be a system message"),
    "system-in-the-middle": ([U, A, S, U], "message 2: role is 'system'; only message 0 may be"),
    "system-for-the-assistant": ([S, U, S], "message 2: role is 'system'; only message 0 may be"),
    "tool": (
        [U, A, Message("tool", "x")],
        "message 2: role is 'tool'; template='nanochat' has none: what a tool gave back is a python_output part",
    ),
    "user-with-parts": ([PARTED["user"]], f"message 0: {PARTS_OF} 'user' it must be a string or text parts"),
    "user-with-parts-after-system": ([S, PARTED["user"]], f"message 1: {PARTS_OF} 'user' it must be"),
    "later-user-with-parts": ([S, U, A, PARTED["user"]], f"message 3: {PARTS_OF} 'user' it must be"),
    "system-with-parts": ([PARTED["system"], U], f"message 0: {PARTS_OF} 'system' it must be a string or text parts"),
    "unknown-part": (
        [U, Message("assistant", (Part("text", "x"), Part("image", "x")))],
        "message 1: part 1 has type 'image'; it must be text, python or python_output",
    ),
    "text-refused": ([S, U, A, Message("user", SPACES)], f"message 3: {REFUSED}"),
    "part-refused": (
        [U, Message("assistant", (Part("text", "x"), Part("python", SPACES)))],
        f"message 1: {REFUSED}",
    ),
    "system-refused": ([Message("system", SPACES[:-1] + "x"), U], f"message 0: {REFUSED}"),
    "chatml-no-messages": ([], "there are no messages"),
    "chatml-unknown-role": (
        [A, Message("judge", "x")],
        "message 1: role is 'judge'; template='chatml' has system, user, assistant, tool",
    ),
    "chatml-parts": ([U, PARTED["assistant"]], f"message 1: {PARTS_OF} 'assistant' it must be a string or text parts"),
    "chatml-text-refused": ([U, Message("user", SPACES)], f"message 1: {REFUSED}"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_a_template_forbids_is_an_error_that_names_the_message(case):
    messages, error = FORBIDDEN[case]
    with pytest.raises(ConversationError) as caught:
        RENDER["chatml" if case.startswith("chatml") else "nanochat"](Conversation(tuple(messages)))
    assert str(caught.value).startswith(error)
    # The caller continues with '. Fix it or pass on_error="skip".'
    assert not str(caught.value).endswith(".")


def test_plain_text_that_cannot_be_encoded_is_a_conversation_error():
    with pytest.raises(ConversationError, match=f"^{REFUSED}"):
        RENDER["nanochat"](Conversation((), SPACES))


def test_messages_that_only_together_cannot_be_encoded_are_a_conversation_error():
    # The bundled pattern ends a run of white space at the newline between the two; this one does not.
    tokenizer = from_ranks(str(DATA / "chat32k.tiktoken"), pattern=r"\S+|\s+(?!\S)|\s+")
    half = " " * 600_000
    conversation = Conversation((Message("system", half), Message("user", half)))
    with pytest.raises(ConversationError, match=r"^tiktoken cannot encode this text of 1,200,002 characters"):
        Renderer(tokenizer, "nanochat")(conversation)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        pytest.param("llama", "template='llama' is not one of 'nanochat', 'chatml', 'llama3', 'hf'", id="unknown"),
        pytest.param(None, "template=None is not one of", id="none"),
        pytest.param(["chatml"], r"template=\['chatml'\] is not one of", id="a-list"),
    ],
)
def test_a_template_that_is_not_known_is_refused(template, error):
    with pytest.raises(ValueError, match=error):
        Renderer(NANOCHAT, template)


@pytest.mark.parametrize(
    ("tokenizer", "template", "error"),
    [
        pytest.param(
            NANOCHAT,
            "chatml",
            r"'chat32k' lacks special tokens of template='chatml': <\|im_start\|>, <\|im_end\|>\. Give",
            id="nanochats-tokenizer-for-chatml",
        ),
        pytest.param(
            CHATML,
            "nanochat",
            r"template='nanochat': <\|user_start\|>, .*<\|python_start\|>, .*<\|output_end\|>\. Give",
            id="chatmls-tokenizer-for-nanochat",
        ),
    ],
)
def test_messages_are_refused_and_texts_are_not_where_the_tokenizer_lacks_tokens(tokenizer, template, error):
    render = Renderer(tokenizer, template)
    with pytest.raises(TemplateError, match=error):
        render(Conversation((Message("user", "a"),)))
    assert render(Conversation((), "a")).ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("a")]


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64, np.uint32, np.uint64])
def test_ids_that_the_tokenizer_does_not_have_are_refused(dtype):
    render = Renderer(NANOCHAT, "nanochat")
    assert render(check({"input_ids": np.array([1, 2, 3], dtype)})).ids.tolist() == [1, 2, 3]
    wrong = -1 if np.issubdtype(dtype, np.signedinteger) else NANOCHAT.vocab_size
    with pytest.raises(ConversationError, match=f"input_ids has {wrong}; tokenizer .* has ids from 0 to"):
        render(check({"input_ids": np.array([1, wrong, 3], dtype)}))
