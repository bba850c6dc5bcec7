"""Bring the messages of a record, in any accepted form, into one.

list of messages, as stored   ->   read_messages()   ->   Messages
                                    keys.py: what each key does    records.py makes a Conversation of them
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn

import numpy as np

from nanopack.conversations import keys
from nanopack.conversations.keys import MESSAGE, PART, SHAPES, bare, is_absent
from nanopack.conversations.lookalikes import looks_like
from nanopack.errors import ConversationError, describe, short

# Llama 3 calls a tool ipython. A function call is what the assistant says, an observation what comes of it.
# Templates without a developer write it as the system.
OUR_ROLES = ("system", "developer", "user", "assistant", "tool")
ROLES = {
    **{role: role for role in OUR_ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("ipython", "observation", "function", "function_response"), "tool"),
}
SYSTEM_ROLES = ("system", "developer")
# As OpenAI's Responses call a text that goes in or comes out.
PART_TYPES = {"text": "text", "python": "python", "python_output": "python_output"}
PART_TYPES |= {"input_text": "text", "output_text": "text"}


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of an assistant's message: what it says, runs, or is given back."""

    type: str
    text: str


# Not frozen, which would double the time that the usual message takes; nothing changes one.
@dataclass(slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str | tuple[Part, ...]
    rest: Mapping[str, Any] | None = None
    """What else the message holds, but for what is absent and what became `train`: tool_calls, name, id, ..."""
    train: bool = True
    """False: nothing of this message is in the loss."""

    @property
    def text(self) -> str | None:
        """The content as one string, the texts of its parts joined; None where a part is not text."""
        if isinstance(self.content, str):
            return self.content
        joined = all(part.type == "text" for part in self.content)
        return "".join(part.text for part in self.content) if joined else None


def read_messages(messages: object, ignored: set[str]) -> tuple[Message, ...]:
    """Return the messages of a list, and add the keys that nothing reads to `ignored`; errors name the message."""
    if type(messages) is not list:
        messages = as_list(messages)
    if not isinstance(messages, (list, tuple)):
        fail(f"the messages must be a list, not {describe(messages)}{remedy(messages)}")
    if not messages:
        fail("the list of messages is empty; there must be at least one")
    checked: list[Message] = []
    try:
        for message in messages:
            if type(message) is dict and len(message) == 2:
                # the usual message takes no further look
                role, content = message.get("role"), message.get("content")
                if content is None:
                    role, content = message.get("from"), message.get("value")
                if type(content) is str and type(role) is str and role in ROLES:
                    checked.append(Message(ROLES[role], content))
                    continue
            checked.append(_message(message, ignored))
    except ConversationError as error:
        raise ConversationError(f"message {len(checked)}: {error}") from None
    return tuple(checked)


def _message(message: object, ignored: set[str]) -> Message:
    if not isinstance(message, (dict, Mapping)):
        fail(f"it must be a dict of 'role' and 'content', not {describe(message)}")
    role_key, content_key = _one_of(message, "role", "from"), _one_of(message, "content", "value")
    role = message.get(role_key)
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        _fail_role(message, role_key)
    rest, train, content = None, True, message.get(content_key)
    if len(message) > 2 or content is None:
        rest, train = _rest(message, known, ignored)
        # Who calls a tool, thinks or refuses need not say anything.
        if content is None and any(MESSAGE.get(key) == keys.TEMPLATE for key in rest):
            content = ""
    said = content if isinstance(content, str) else read_parts(content, content_key, ignored)
    return Message(known, said, rest or None, train)


def _one_of(message: Mapping[str, object], name: str, other: str) -> str:
    if message.get(other) is None:
        return name
    if message.get(name) is not None:
        fail(f"it has both {name!r} and {other!r}; remove one of them")
    return other


def _rest(message: Mapping[str, Any], role: str, ignored: set[str]) -> tuple[dict[str, Any], bool]:
    """Return the other keys of a message, and whether it may be in the loss."""
    rest: dict[str, Any] = {}
    flags: dict[str, bool] = {}
    for key, value in ((key, bare(value)) for key, value in message.items()):
        kind = MESSAGE.get(key)
        # harmony's channel for what is said aloud
        if kind == keys.READ or is_absent(value) or (key == "channel" and value == "final"):
            continue
        if kind in (keys.IN_LOSS, keys.NOT_IN_LOSS):
            flags[key] = _flag(key, value, role) == (kind == keys.IN_LOSS)
        elif kind == keys.REFUSED:
            content = "give its texts as content, a list of parts {'type': 'text', 'text': ...}"
            loss = "say whether the message is in the loss by weight, 0 or 1"
            fail(f"{key} cannot be honoured: {short(value)}; {content if key in _CONTENT else loss}")
        elif kind != keys.TEMPLATE or value is not False:
            rest[key] = read_dicts(value, key) if key == "tool_calls" else _unwrapped(value)
            if kind is None:
                _check_unknown(str(key), value, "message")
                ignored.add(f"message.{key}")
    if len(set(flags.values())) > 1:
        fail(f"{' and '.join(flags)} contradict each other; remove all of them but one")
    return rest, all(flags.values())


_CONTENT = ("parts", "attachments")


def _check_unknown(key: str, value: object, of: str) -> None:
    """Raise ConversationError where an unknown key of a message or part looks like one that matters."""
    like = looks_like(key, value, of)
    if like == "loss":
        fail(
            f"{key} is not known, and may say what is in the loss: {short(value)}; give the message a weight of 0 or 1"
        )
    if like == "media":
        fail(f"{key} is not known, and nanopack packs text: {short(value)}; remove it")
    if like:
        fail(f"{key} is not known, and looks like {like}; name it so, or remove it")


def _flag(key: str, value: object, role: str) -> bool:
    if isinstance(value, Real) and value in (0, 1):
        # Some data sets write weight 1 or masked False at every message; train at a user's asks for what cannot be.
        if value and role != "assistant" and key not in ("weight", "masked"):
            fail(f"{key} is {value!r}, but what a {role} says is in the loss only as the template says; remove it")
        return bool(value)
    fail(f"{key} must be 0 or 1, true or false, not {describe(value)}")


def read_parts(content: object, key: str, ignored: set[str]) -> tuple[Part, ...]:
    """Return the parts of a content that is a list; `key` is what errors call it."""
    content = as_list(content)
    if not isinstance(content, (list, tuple)):
        fail(f"{key} must be a str or a list of parts, not {describe(content)}")
    parts = []
    for number, part in enumerate(content):
        if not isinstance(part, (dict, Mapping)):
            fail(f"part {number} of {key} must be a dict of 'type' and 'text', not {describe(part)}")
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in PART_TYPES:
            what = f"type is {short(kind)}" if "type" in part else "it has no type"
            fail(f"part {number} of {key}: {what}; allowed are text, python, python_output")
        for name in [name for name, value in part.items() if not is_absent(value)] if len(part) > 2 else ():
            if PART.get(name) == keys.REFUSED:
                fail(f"part {number} of {key}: {name} cannot be honoured: {short(part[name])}; remove it")
            if name not in PART:
                _check_unknown(str(name), part[name], "part")
                ignored.add(f"part.{name}")
        parts.append(Part(PART_TYPES[kind], read_text(part.get("text"), f"text of part {number}")))
    return tuple(parts)


def read_text(text: object, name: str) -> str:
    """Return the text; ConversationError where it is none."""
    if not isinstance(text, str):
        fail(f"{name} must be a str, not {describe(text)}")
    return text


def is_object_array(value: object) -> bool:
    """Return whether this is a flat array of Python objects, as pandas has them."""
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype == object


def as_list(value: object) -> object:
    """Return the list that an object array (of pandas) or a dict of lists (of Arrow) stands for, else the value."""
    if is_object_array(value):
        return _unwrapped(value)
    if isinstance(value, Mapping) and value.keys() & {"content", "value", "text"}:
        columns: dict[str, Any] = {key: as_list(column) for key, column in value.items() if column is not None}
        if all(isinstance(column, (list, tuple)) for column in columns.values()):
            rows = zip(*columns.values(), strict=False)
            if len(set(map(len, columns.values()))) == 1:
                return [{k: v for k, v in zip(columns, row, strict=True) if v is not None} for row in rows]
    return value


def _unwrapped(value: Any, arrow: bool = False) -> Any:
    """Return a value as lists, dicts and plain scalars; what comes in arrays was in Arrow, where null is absent."""
    if isinstance(value, str):
        return value
    # of numpy or torch, without dimensions too
    if hasattr(value, "tolist"):
        return _unwrapped(value.tolist(), True)
    if isinstance(value, (list, tuple)):
        return [_unwrapped(item, arrow) for item in value]
    if isinstance(value, Mapping):
        return {key: _unwrapped(item, arrow) for key, item in value.items() if item is not None or not arrow}
    return value


def _parsed(value: object, key: str) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            fail(f"{key} is text that is not JSON ({error}): {short(value)}; give a list or its JSON")
    return _unwrapped(value)


def read_dicts(value: object, key: str) -> list[dict[str, Any]]:
    """Return a list of dicts that may come as JSON text, as a whole or each of them."""
    items = _parsed(value, key)
    items = [_parsed(item, key) for item in items] if isinstance(items, list) else items
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        fail(f"{key} must be a list of dicts, or JSON text of one, not {describe(value)}")
    return items


def read_dict(value: object, key: str) -> dict[str, Any]:
    """Return a dict that may come as JSON text."""
    parsed = _parsed(value, key)
    if not isinstance(parsed, dict):
        fail(f"{key} must be a dict, or JSON text of one, not {describe(value)}")
    return parsed


def fail(why: str) -> NoReturn:
    """Raise ConversationError."""
    raise ConversationError(why)


def _fail_role(message: Mapping[str, object], key: str) -> NoReturn:
    if key not in message and message.keys() & {*SHAPES}:
        has = ", ".join(key for key in SHAPES if key in message)
        fail(
            f"it has no role, but {has}, as a record has: give it a role and content; a file that is one JSON "
            "array of records must be named .json"
        )
    allowed = ", ".join(sorted(OUR_ROLES))
    fail(f"{key} is {short(message.get(key))}; allowed are {allowed}, or ShareGPT's names for them")


def remedy(value: object) -> str:
    """Return the remedy for JSON text, or for an array or a table, which a data set in another format gives."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return "; it is text: give what json.loads makes of it"
    known = type(value).__module__.split(".")[0] in ("numpy", "pandas", "pyarrow", "polars", "torch")
    return "; give plain lists and dicts: a datasets.Dataset does with .with_format(None)" if known else ""
