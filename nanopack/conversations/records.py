"""Open a data set of conversations, and bring each into one shape.

    files, lists, data sets   ->   open_conversations()[i]   ->   check()   ->   Conversation
          files.py                    i from Share                     render.py makes it a document

No conversation is read before it is asked for, and none is tokenized here. In which order roles may follow
each other is the chat template's business (render.py).
"""

from __future__ import annotations

import glob
import operator
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, NoReturn, Protocol, TypeGuard

import numpy as np

from nanopack.conversations.files import COLUMNS, Files, open_files
from nanopack.errors import ConversationError

__all__ = [
    "Conversation",
    "ConversationError",
    "Message",
    "Part",
    "Source",
    "check",
    "open_conversations",
]

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Llama 3 calls a tool ipython.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "ipython": "tool"}
# A function call is what the assistant says, an observation what comes of it.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", **ROLES}
SHAREGPT_ROLES |= {"function_call": "assistant", "observation": "tool"}
PART_TYPES = ("text", "python", "python_output")
FLOAT32_MAX = 3.4028234663852886e38


class Source(Protocol):
    """Conversations by number, as every other module sees them. Whoever has them in this form inherits from it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> object:
        """Return the record as it was stored, for 0 <= index < len; IndexError elsewhere."""

    def where(self, index: int) -> str:
        """Return where the record stands: 'chats.jsonl:17', 'chats.parquet row 17' or 'conversation 17'.

        Lines count from 1, as in an editor; rows and conversations from 0, as in Python.
        """


class Items(Source):
    """The records of an object with len and [int]: list, datasets.Dataset, torch Dataset, nanochat task."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> object:
        if not 0 <= index < len(self._items):
            raise IndexError(f"conversation {index} of {len(self._items)}")
        # nanochat's tasks refuse numpy's integers.
        return self._items[operator.index(index)]

    def where(self, index: int) -> str:
        return f"conversation {index}"


def open_conversations(conversations: Any) -> Source:
    """Return the conversations of an object with len and [int], or of one or more paths or globs; a Source as it is.

    Files end in .jsonl, .jsonl.gz or .parquet. A glob gives its files sorted, a list keeps its order. Raises
    ValueError for what is empty, missing or unreadable, ImportError for a .parquet file without pyarrow.
    """
    if isinstance(conversations, (str, os.PathLike)):
        conversations = [conversations]
    if _is_source(conversations):
        source: Source = conversations
    elif isinstance(conversations, (list, tuple)) and any(map(_is_path, conversations)):
        source = open_files([path for item in conversations for path in find_files(item)])
    else:
        _refuse_unusable(conversations)
        source = Items(conversations)
    if len(source) == 0:
        raise ValueError(f"conversations={short(conversations)} holds no conversation; give at least one")
    return source


def find_files(item: Any) -> list[str]:
    """Return the files that a path or a glob stands for; ValueError where there is none that can be read."""
    if not _is_path(item):
        raise ValueError(f"conversations mixes paths with {_value(item)}; give paths or records, not both")
    path = os.fsdecode(item)
    # A file whose name looks like a glob is meant itself.
    literal = os.path.exists(path) or not glob.has_magic(path)
    paths = [path] if literal else sorted(glob.glob(path, recursive=True))
    if not paths:
        raise ValueError(f"conversations={path!r} matches no file; the working directory is {os.getcwd()}")
    for path in paths:
        _refuse_unreadable(path)
    return paths


def _is_source(item: object) -> TypeGuard[Source]:
    # By descent, not by its methods: a pandas.Series has all of them, and means something else by where().
    return isinstance(item, Files) or Source in type(item).__mro__


def _is_path(item: object) -> bool:
    return isinstance(item, (str, os.PathLike))


def _is_record(item: object) -> bool:
    return isinstance(item, (dict, Mapping, list, tuple))


def _refuse_unreadable(path: str) -> None:
    if os.path.isdir(path):
        why = f"is a directory; name the files in it, such as {os.path.join(path, '*.jsonl')!r}"
    elif not os.path.exists(path):
        why = f"does not exist; the working directory is {os.getcwd()}, and a text goes in as {{'text': ...}}"
    elif not path.lower().endswith(SUFFIXES):
        why = f"has an unknown suffix; known are {', '.join(SUFFIXES)}"
    elif not os.path.isfile(path) or not os.access(path, os.R_OK):
        why = "is not a file that can be read; give a plain file and check its permissions"
    else:
        return
    raise ValueError(f"conversations={short(path, 200)} {why}")


def _refuse_unusable(items: Any) -> None:
    kind = type(items)
    if isinstance(items, Mapping):
        why = "is one dict; put a conversation into a list, give one split of a DatasetDict: data['train']"
    elif isinstance(items, (bytes, bytearray)):
        why = "is not a path; give it as str"
    elif isinstance(items, Iterator) or not (hasattr(kind, "__len__") and hasattr(kind, "__getitem__")):
        why = "has no len() and [int]; give list(...) of it, or files"
    elif kind.__name__ == "DataFrame":
        why = "hands out columns; give df.to_dict('records')"
    elif isinstance(items, (list, tuple)) and items and not any(map(_is_record, items)):
        why = "holds no records; give dicts such as {'messages': [...]}, or paths"
    else:
        return
    raise ValueError(f"conversations={_value(items)} {why}")


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of an assistant's message: what it says, runs, or is given back."""

    type: str
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str | tuple[Part, ...]
    rest: Mapping[str, Any] | None = None
    """What else the message holds and is not absent, such as tool_calls; see `MESSAGE` in keys.py."""
    train: bool = True
    """False: nothing of this message is in the loss."""

    @property
    def text(self) -> str | None:
        """The content as one string, the texts of its parts joined; None where a part is not text."""
        if isinstance(self.content, str):
            return self.content
        joined = all(part.type == "text" for part in self.content)
        return "".join(part.text for part in self.content) if joined else None


class Tokens(NamedTuple):
    """A document that is rendered already."""

    ids: np.ndarray
    """(n,) of any integers; whether the tokenizer has them, render.py checks."""
    mask: np.ndarray | None
    """(n,) bool: which are trained; None: all."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, or the text of a plain document, or the tokens of one that is rendered already."""

    messages: tuple[Message, ...]
    text: str | None = None
    weight: float = 1.0
    tokens: Tokens | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    """Definitions of tools, for template="hf"."""
    template_kwargs: Mapping[str, Any] | None = None
    """What else the chat template is given, for template="hf"."""


def check(record: object) -> Conversation:
    """Return the conversation of a record of any accepted shape; ConversationError says what is wrong.

    Shapes: {"messages": [{"role", "content"}, ...]}; that list bare; ShareGPT's {"conversations": [{"from",
    "value"}, ...]}; {"text": str}; {"input_ids": ints, "loss_mask": bools or 0 and 1}, as arrays or lists, taken as
    they are; without loss_mask all are trained. A "weight" may stand beside them. Other keys of the record are
    ignored, those of a message are for template="hf"; a key that is None counts as absent, and so may content beside
    tool_calls.

    >>> check({"conversations": [{"from": "human", "value": "hi"}]})
    Conversation(messages=(Message(role='user', content='hi', rest=None),), text=None, weight=1.0, tokens=None)
    """
    if isinstance(record, (list, tuple)):
        return Conversation(_messages(record, "role", "content", ROLES))
    if not isinstance(record, (dict, Mapping)):
        _fail(f"a conversation is a dict or a list of messages, not {_value(record)}{_remedy(record)}")
    shapes = [key for key in COLUMNS if record.get(key) is not None]
    if len(shapes) != 1:
        _fail_shape(record, shapes)
    weight = _weight(record.get("weight"))
    if shapes == ["text"]:
        return Conversation((), _text(record["text"], "text"), weight)
    if shapes == ["input_ids"]:
        return Conversation((), None, weight, _tokens(record["input_ids"], record.get("loss_mask")))
    if shapes == ["messages"]:
        return Conversation(_messages(record["messages"], "role", "content", ROLES), None, weight)
    return Conversation(_messages(record["conversations"], "from", "value", SHAREGPT_ROLES), None, weight)


def _messages(messages: object, role_key: str, content_key: str, roles: dict[str, str]) -> tuple[Message, ...]:
    if not isinstance(messages, (list, tuple)):
        _fail(f"the messages must be a list, not {_value(messages)}{_remedy(messages)}")
    if not messages:
        _fail("the list of messages is empty; there must be at least one")
    checked: list[Message] = []
    try:
        for message in messages:
            checked.append(_message(message, role_key, content_key, roles))
    except ConversationError as error:
        raise ConversationError(f"message {len(checked)}: {error}") from None
    return tuple(checked)


def _message(message: object, role_key: str, content_key: str, roles: dict[str, str]) -> Message:
    if not isinstance(message, (dict, Mapping)):
        _fail(f"it must be a dict of {role_key!r} and {content_key!r}, not {_value(message)}")
    role, content = message.get(role_key), message.get(content_key)
    if not isinstance(role, str) or role not in roles:
        _fail_role(message, role_key, roles)
    rest = None
    if len(message) > 2 or content is None:
        rest = {k: v for k, v in message.items() if k not in (role_key, content_key) and v is not None}
        # Who calls a tool need not say anything.
        content = "" if content is None and rest.get("tool_calls") else content
    return Message(roles[role], content if isinstance(content, str) else _parts(content, content_key), rest or None)


def _parts(content: object, key: str) -> tuple[Part, ...]:
    if not isinstance(content, (list, tuple)):
        _fail(f"{key} must be a str or a list of parts, not {_value(content)}")
    parts = []
    for number, part in enumerate(content):
        if not isinstance(part, (dict, Mapping)):
            _fail(f"part {number} of {key} must be a dict of 'type' and 'text', not {_value(part)}")
        kind = part.get("type")
        if kind not in PART_TYPES:
            _fail(f"part {number} of {key}: type is {short(kind)}; allowed are {', '.join(PART_TYPES)}")
        parts.append(Part(kind, _text(part.get("text"), f"text of part {number}")))
    return tuple(parts)


def _text(text: object, name: str) -> str:
    if not isinstance(text, str):
        _fail(f"{name} must be a str, not {_value(text)}")
    return text


def _tokens(ids: object, mask: object) -> Tokens:
    array = _array(ids, "input_ids")
    if not len(array):
        _fail("input_ids is empty; a document has at least one token")
    if array.dtype.kind not in "iu":
        _fail(f"input_ids must be ints, not {array.dtype}")
    if mask is None:
        return Tokens(array, None)
    trained = _array(mask, "loss_mask")
    if trained.dtype != bool:
        if trained.dtype.kind not in "iu" or trained.min(initial=0) < 0 or trained.max(initial=0) > 1:
            _fail(f"loss_mask must be bools or 0 and 1, not {short(mask)} of {trained.dtype}")
        trained = trained.astype(bool)
    if len(trained) != len(array):
        _fail(f"loss_mask has {len(trained)} entries for {len(array)} input_ids; give one for each")
    return Tokens(array, trained)


def _array(values: object, name: str) -> np.ndarray:
    if isinstance(values, np.ma.MaskedArray) and values.mask.any():
        _fail(f"{name} has masked entries: {short(values)}; give .compressed() or .filled(value) of it")
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError, TypeError) as error:
        _fail(f"{name} is no flat array or list of numbers ({error})")
    if array.ndim != 1:
        _fail(f"{name} must be flat, not of shape {array.shape}: {short(values)}")
    return array


def _weight(weight: object) -> float:
    if weight is None:
        return 1.0
    # numpy's numbers: the small ones cannot be compared with float32's largest.
    if isinstance(weight, Real) and not isinstance(weight, int):
        weight = float(weight)
    # Beyond float32's largest number a weight would reach the loss as infinity; NaN fails every comparison.
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= FLOAT32_MAX:
        _fail(f"weight must be a number from 0 to {FLOAT32_MAX:.1e} (float32), not {_value(weight)}")
    return float(weight)


def _fail(why: str) -> NoReturn:
    raise ConversationError(why)


def _fail_shape(record: Mapping[str, object], shapes: Sequence[str]) -> NoReturn:
    if shapes:
        _fail(f"the record has {' and '.join(shapes)}; remove all of them but one, or set the others to null")
    hint = "this is a message, put it into a list" if "role" in record or "from" in record else "rename one"
    _fail(f"the record has the keys {short(list(record))}, but none of {', '.join(COLUMNS)}; {hint}")


def _fail_role(message: Mapping[str, object], key: str, roles: Mapping[str, str]) -> NoReturn:
    other, shape = ("from", "conversations") if key == "role" else ("role", "messages")
    if key not in message and other in message:
        _fail(f"has {other!r} instead of {key!r}; messages with {other!r} belong under {shape!r}")
    _fail(f"{key} is {short(message.get(key))}; allowed are {', '.join(sorted(roles))}")


def _value(value: object) -> str:
    return f"{short(value)} of type {type(value).__name__}"


def _remedy(value: object) -> str:
    """Return what to do about an array or a table, which a data set of another format hands out instead of lists."""
    known = type(value).__module__.split(".")[0] in ("numpy", "pandas", "pyarrow", "polars", "torch")
    return "; give plain lists and dicts: a datasets.Dataset does with .with_format(None)" if known else ""


def short(value: object, length: int = 60) -> str:
    """Return the value as Python writes it, on one line, cut in the middle to about `length` characters.

    >>> short("a" * 1000, 20)
    "'aaaaaa...aaaaaaaa'"
    """
    writer = reprlib.Repr()
    writer.maxlevel, writer.maxstring, writer.maxother = 2, length, length
    text = " ".join(map(str.strip, writer.repr(value).splitlines()))
    return text if len(text) <= length else f"{text[: length - 3]}..."
