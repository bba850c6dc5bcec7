"""The slow packer's messages: roles and contents of every spelling, and what is said about the loss.

    what a record holds as its messages   ->   read_messages()   ->   Said   ->   documents.py renders them

A part of the definition. It shares nothing with the fast path but the name of an error. The template that renders the
messages checks their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

from nanopack.errors import ConversationError
from nanopack.reference.values import (
    as_list,
    list_of_dicts,
    plain,
    refuse_suspects,
    says_nothing,
    scalar,
    string,
)

ROLES = {
    "system": ["system"],
    "developer": ["developer"],
    "user": ["user", "human", "prompter"],
    "assistant": ["assistant", "gpt", "chatgpt", "model", "bot", "ai", "bing", "bard", "function_call"],
    "tool": ["tool", "ipython", "observation", "function", "function_response"],
}
# Only a tokenizer's own chat template can write these.
WRITTEN_BY_HF = {
    *("tool_calls", "function_call", "tools", "functions", "tool_plan", "tool_responses", "tool_results"),
    *("tool_call", "arguments", "thinking_blocks"),
    *("reasoning_content", "reasoning", "reasoning_details", "thinking", "thoughts", "thought", "refusal"),
    *("citations", "images", "image", "videos", "video", "audios", "audio", "documents", "prefix", "partial"),
    *("function_calls", "tool_use", "tool_uses", "tool_code", "tool_result", "tool_output", "tool_outputs"),
    *("channel", "chain_of_thought", "cot"),
}
# Nothing can honour these.
REFUSED_IN_MESSAGE = [
    *("mask", "loss_mask", "loss_scale", "loss_weight", "train_detail", "training_detail", "parts", "attachments")
]
REFUSED_IN_PART = [
    *("image", "image_url", "images", "audio", "input_audio", "video", "file", "document", "thinking", "reasoning"),
    *("weight", "train", "training", "trainable", "loss", "masked", "mask", "loss_mask"),
]
MARKS = ["weight", "train", "training", "trainable", "is_trainable", "train_on_turn", "loss", "masked"]
MATTERS = {*WRITTEN_BY_HF, *REFUSED_IN_MESSAGE, *MARKS}
# Known, though its words may look like a call.
KNOWN = {*MATTERS, "tool_call_id"}


class Said(NamedTuple):
    """A message."""

    role: str
    content: str | list[tuple[str, str]]
    """A string, or parts as (type, text)."""
    rest: dict[str, Any]
    """What else it holds."""
    train: bool = True
    """False: nothing of it is in the loss."""

    def string(self, index: int) -> str:
        """The content as a string; ConversationError where it has parts that are not text."""
        if isinstance(self.content, str):
            return self.content
        if any(kind != "text" for kind, _ in self.content):
            raise ConversationError(f"message {index}: content has parts that are not text")
        return "".join(text for _, text in self.content)


def role_of(name: object) -> str | None:
    """The role that a name stands for; None for an unknown name."""
    names = {other: role for role, others in ROLES.items() for other in others}
    return names.get(name.strip().lower()) if isinstance(name, str) else None


def instructed(held: Mapping[str, Any]) -> list[Said]:
    """The messages of a record with `instruction`, `input`, `output` and `history`."""
    said = []
    pairs = as_list(held.get("history", []))
    for pair in pairs if isinstance(pairs, (list, tuple)) else [pairs]:
        pair = as_list(pair)
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ConversationError("its history must be a list of pairs")
        said += [Said("user", string(pair[0], "history"), {}), Said("assistant", string(pair[1], "history"), {})]
    asked = [string(held[key], key) for key in ("instruction", "input") if key in held]
    said.append(Said("user", "\n".join(text for text in asked if text != ""), {}))
    return [*said, Said("assistant", string(held["output"], "output"), {})]


def read_messages(messages: Any) -> list[Said]:
    """The messages of a list in any of the accepted forms."""
    messages = as_list(messages)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConversationError("its messages must be a list of at least one")
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: Any) -> Said:
    if not isinstance(message, Mapping):
        raise ConversationError(f"message {index}: it must be a dict")
    held = {key: scalar(value) for key, value in message.items() if value is not None}
    if {"role", "from"} <= {*held} or {"content", "value"} <= {*held}:
        raise ConversationError(f"message {index}: it has role and from, or content and value")
    role = role_of(held.get("role", held.get("from")))
    if role is None:
        raise ConversationError(f"message {index}: its role is unknown")
    rest, marks = {}, []
    for key, value in held.items():
        if key in ("role", "from", "content", "value") or says_nothing(value):
            continue
        if (key, value) == ("channel", "final"):
            continue
        if key in MARKS:
            marks.append(_mark(index, key, value, role) != (key == "masked"))
        elif key in REFUSED_IN_MESSAGE:
            raise ConversationError(f"message {index}: its {key} cannot be honoured")
        elif not (key in WRITTEN_BY_HF and value is False):
            rest[key] = list_of_dicts(value) if key == "tool_calls" else plain(value)
            refuse_suspects({key: value}, MATTERS, KNOWN, "message")
    if len({*marks}) > 1:
        raise ConversationError(f"message {index}: it contradicts itself about the loss")
    content = held.get("content", held.get("value"))
    if content is None and {*rest} & WRITTEN_BY_HF:
        # A call of a tool may come without words.
        content = ""
    return Said(role, content if isinstance(content, str) else read_parts(content), rest, all(marks))


def _mark(index: int, key: str, value: Any, role: str) -> bool:
    if not isinstance(value, Real) or value not in (0, 1):
        raise ConversationError(f"message {index}: its {key} must be 0 or 1")
    if value and role != "assistant" and key not in ("weight", "masked"):
        raise ConversationError(f"message {index}: its {key} asks to train what the assistant does not say")
    return bool(value)


def read_parts(content: Any) -> list[tuple[str, str]]:
    """The parts of a content as (type, text)."""
    content = as_list(content)
    if not isinstance(content, (list, tuple)):
        raise ConversationError("a content must be a string or a list of parts")
    parts = []
    for part in content:
        if not isinstance(part, Mapping):
            raise ConversationError("a part must be a dict")
        kind = {"input_text": "text", "output_text": "text"}.get(str(part.get("type")), part.get("type"))
        if kind not in ("text", "python", "python_output") or not isinstance(part.get("text"), str):
            raise ConversationError("a part is not a text, python or python_output with a text")
        if refused := [key for key in REFUSED_IN_PART if not says_nothing(part.get(key))]:
            raise ConversationError(f"a part's {refused} cannot be honoured")
        present = {key: item for key, item in part.items() if not says_nothing(item)}
        refuse_suspects(present, {*REFUSED_IN_PART}, {*REFUSED_IN_PART}, "part")
        parts.append((kind, part["text"]))
    return parts


def choose(messages: list[Said], loss: str, first_assistant: str) -> list[Said]:
    """The messages as the arguments `loss` and `first_assistant` want them."""
    front = messages[:1] if messages and messages[0].role in ("system", "developer") else []
    others = messages[len(front) :]
    if first_assistant != "keep" and others and others[0].role == "assistant":
        if first_assistant == "raise":
            raise ConversationError("it begins with the assistant")
        if first_assistant == "empty_user":
            others = [Said("user", "", {}), *others]
        while first_assistant == "drop" and others and others[0].role != "user":
            others = others[1:]
        if not others:
            raise ConversationError("it has no message of a user")
    messages = [*front, *others]
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if loss != "last" or not messages:
        return messages
    return [
        message._replace(train=message.train and index == (answers[-1] if answers else 0))
        for index, message in enumerate(messages)
    ]
