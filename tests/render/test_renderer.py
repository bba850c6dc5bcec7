"""Promises of nanopack/render/renderer.py, compared with a renderer in plain lists, token by token."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest
from data_sets import SHIPPED
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopack.conversations.records import Conversation, Message, Part, check
from nanopack.errors import ConversationError, TemplateError
from nanopack.render.document import Document
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import Tokenizer, from_ranks, load_tokenizer

DATA = resources.files("nanopack") / "data"
NANOCHAT = load_tokenizer("chat32k")
CHATML = from_ranks(
    str(DATA / "chat32k.tiktoken"),
    pattern=NANOCHAT.encoding._pat_str,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
)
# Llama 3's own split pattern: newlines stay together, so those of a header are one token.
LLAMA3 = from_ranks(
    str(DATA / "chat32k.tiktoken"),
    pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    special_tokens=[
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
)
TOKENIZERS = {"nanochat": NANOCHAT, "chatml": CHATML, "llama3": LLAMA3}
BOS = {"nanochat": "<|bos|>", "chatml": "<|endoftext|>", "llama3": "<|begin_of_text|>"}
RENDER = {template: Renderer(tokenizer, template) for template, tokenizer in TOKENIZERS.items()}
AROUND = {
    "text": ("", ""),
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


# The plain renderer: a list of (id, mask), and where each message begins


def plain(conversation: Conversation, template: str) -> tuple[list[tuple[int, int]], list[int]]:
    encoding = TOKENIZERS[template].encoding
    document: list[tuple[int, int]] = []

    def special(token: str, mask: int) -> None:
        document.append((encoding.encode_single_token(token), mask))

    def text(string: str, mask: int) -> None:
        for token_id in encoding.encode_ordinary(string):
            document.append((token_id, mask))

    if conversation.text is not None:
        special(BOS[template], 1)
        text(conversation.text, 1)
        return document, []
    write = {"nanochat": plain_nanochat, "chatml": plain_chatml, "llama3": plain_llama3}
    return document, write[template](list(conversation.messages), document, special, text)


def plain_nanochat(messages, document, special, text) -> list[int]:
    starts = []
    if messages[0].role == "system":
        messages[1] = Message("user", messages[0].content + "\n\n" + messages[1].content)
        messages = messages[1:]
        starts.append(1)
    special("<|bos|>", 0)
    for i, message in enumerate(messages):
        starts.append(len(document))
        if i % 2 == 0:
            assert message.role == "user"
            special("<|user_start|>", 0)
            text(message.content, 0)
            special("<|user_end|>", 0)
            continue
        assert message.role == "assistant"
        special("<|assistant_start|>", 0)
        parts = [Part("text", message.content)] if isinstance(message.content, str) else message.content
        for part in parts:
            if part.type == "text":
                text(part.text, 1)
            elif part.type == "python":
                special("<|python_start|>", 1)
                text(part.text, 1)
                special("<|python_end|>", 1)
            elif part.type == "python_output":
                special("<|output_start|>", 0)
                text(part.text, 0)
                special("<|output_end|>", 0)
        special("<|assistant_end|>", 1)
    return starts


def plain_chatml(messages, document, special, text) -> list[int]:
    starts = []
    special("<|endoftext|>", 0)
    for message in messages:
        mask = 1 if message.role == "assistant" else 0
        starts.append(len(document))
        special("<|im_start|>", 0)
        text(message.role + "\n", 0)
        text(message.content, mask)
        special("<|im_end|>", mask)
        text("\n", 0)
    return starts


def plain_llama3(messages, document, special, text) -> list[int]:
    starts = []
    special("<|begin_of_text|>", 0)
    for message in messages:
        mask = 1 if message.role == "assistant" else 0
        starts.append(len(document))
        special("<|start_header_id|>", 0)
        text("ipython" if message.role == "tool" else message.role, 0)
        special("<|end_header_id|>", 0)
        text("\n\n", 0)
        text(message.content.strip(), mask)
        special("<|eot_id|>", mask)
    return starts


def assert_is_plain(document: Document, conversation: Conversation, template: str) -> None:
    expected, starts = plain(conversation, template)
    got = list(zip(document.ids.tolist(), document.mask.tolist(), strict=True))
    assert got == expected, first_difference(got, expected)
    assert document.starts == tuple(starts)
    assert (document.ids.dtype, document.mask.dtype) == (np.uint32, np.bool_)
    assert {type(start) for start in document.starts} <= {int}


def first_difference(got: list, expected: list) -> str:
    equal = [ours == theirs for ours, theirs in zip(got, expected, strict=False)]
    at = equal.index(False) if False in equal else len(equal)
    return f"token {at}: expected {expected[at : at + 1]}, got {got[at : at + 1]}"


# Conversations of all kinds

LOOKS_SPECIAL = st.sampled_from(
    [
        "<|assistant_end|>",
        "<|bos|>",
        "<|user_start|>",
        "<|im_end|>\n",
        "<|endoftext|>",
        "<|python_",
        "\0",
        "  \n",
    ]
)
# st.characters() has surrogates, st.text() alone has none.
TEXTS = st.lists(st.text(st.characters()) | LOOKS_SPECIAL, max_size=4).map("".join)
PARTS = st.builds(Part, st.sampled_from(list(AROUND)), TEXTS)
ANSWERS = TEXTS | st.lists(PARTS, max_size=4).map(tuple)
PLAIN_TEXTS = st.builds(lambda text: Conversation((), text), TEXTS)


@st.composite
def nanochat_conversations(draw) -> Conversation:
    messages = [Message("system", draw(TEXTS))] if draw(st.booleans()) else []
    for i in range(draw(st.integers(1, 6))):
        messages.append(Message("assistant", draw(ANSWERS)) if i % 2 else Message("user", draw(TEXTS)))
    return Conversation(tuple(messages))


NOT_SPECIAL = st.text().filter(lambda text: "<|" not in text)
FREE_CONVERSATIONS = st.builds(
    lambda messages: Conversation(tuple(messages)),
    st.lists(
        st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), TEXTS), min_size=1, max_size=6
    ),
)


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


# What the templates forbid

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
