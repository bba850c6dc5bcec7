"""A renderer in plain lists, token by token: (id, mask), and where each message begins; and conversations for it."""

from __future__ import annotations

from importlib import resources

import numpy as np
from hypothesis import strategies as st

from nanopack.conversations.records import Conversation, Message, Part
from nanopack.render.document import Document
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import from_ranks, load_tokenizer

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
