"""The slow packer's records: every shape checked and brought into one.

    files.py   ->   conversation()   ->   Record   ->   documents.py renders it

A part of the definition. It shares nothing with the fast path but the name of an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from nanopack.errors import ConversationError
from nanopack.reference.messages import Said, instructed, read_messages, read_parts, role_of
from nanopack.reference.tokens import NOTES, OF_TOKENS, Tokens, read_tokens, refuse_unread
from nanopack.reference.values import (
    is_nan,
    is_none,
    is_object_array,
    list_of_dicts,
    parse_json,
    refuse_suspects,
    says_nothing,
    scalar,
    string,
)

FLOAT32_MAX = 3.4028234663852886e38
# Nothing can honour these.
REFUSED_IN_RECORD = [
    *("functions", "images", "image", "videos", "video", "audios", "audio", "documents", "train", "training"),
    *("trainable", "masked", "loss_weight", "loss_weights", "sample_weight", "token_weights"),
    *("prompt_mask", "action_mask", "label_mask", "label_ids", "target_ids", "decoder_input_ids"),
    *("tool_calls", "function_call", "reasoning", "reasoning_content", "thinking", "thought", "thoughts"),
    *("chain_of_thought", "cot", "enable_thinking", "reasoning_effort"),
]
SYSTEMS = ["system", "system_prompt", "system_message", "system_instruction"]
MATTERS = {*OF_TOKENS, *REFUSED_IN_RECORD, *SYSTEMS, "tools", "chat_template_kwargs", "mask"}
# Known, though they look as if they mattered.
KNOWN = ["weight", "label", "kto_tag", *NOTES]


@dataclass
class Record:
    """A record of any shape: messages, a text, or tokens (id, in the loss)."""

    messages: list[Said]
    text: str | None = None
    tokens: Tokens | None = None
    weight: float = 1.0
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None


def conversation(record: object) -> Record:
    """A record's content; ConversationError where it is not a record, or something in it cannot be honoured."""
    if isinstance(record, (list, tuple)) or is_object_array(record):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise ConversationError(f"it is a {type(record).__name__}; it must be a dict or a list of messages")
    # A Parquet file has every column in every row: null means absent. pandas writes it as NaN.
    held = {key: scalar(value) for key, value in record.items() if not is_none(value)}
    held = {key: value for key, value in held.items() if not is_nan(key, value)}
    shape = _shape(held)
    _refuse(held, shape)
    found = Record(_messages(held, shape), weight=_weight(held.get("weight")))
    if shape == "text":
        found.text = string(held["text"], "text")
    if shape == "input_ids":
        found.tokens = read_tokens(held)
        refuse_unread(held)
    if not says_nothing(held.get("tools")):
        found.tools = list_of_dicts(held["tools"])
    if not says_nothing(held.get("chat_template_kwargs")):
        found.template_kwargs = parse_json(held["chat_template_kwargs"])
        if not isinstance(found.template_kwargs, dict):
            raise ConversationError("its chat_template_kwargs must be a dict")
        found.template_kwargs = {name: one for name, one in found.template_kwargs.items() if one is not None} or None
    return found


def _shape(held: Mapping[str, Any]) -> str:
    """The key by which a record is known."""
    shapes = [key for key in ("messages", "conversations", "text", "input_ids") if key in held]
    shapes += ["prompt"] if {"prompt", "completion"} <= {*held} else []
    shapes += ["instruction"] if {"instruction", "output"} <= {*held} else []
    if len(shapes) != 1:
        raise ConversationError(f"it must have exactly one of messages, conversations, text, ..., and has {shapes}")
    return shapes[0]


def _refuse(held: Mapping[str, Any], shape: str) -> None:
    """Raise ConversationError for a key that means something which a record of this shape cannot have."""
    for key in [*REFUSED_IN_RECORD, *(OF_TOKENS if shape != "input_ids" else [])]:
        if key in held and (key in OF_TOKENS or not says_nothing(held[key])):
            raise ConversationError(f"its {key} cannot be honoured")
    if not says_nothing(held.get("mask")) and (
        shape in ("text", "input_ids") or not isinstance(held["mask"], str) or role_of(held["mask"]) != "user"
    ):
        raise ConversationError("its mask says nothing that can be honoured")
    if any(_says_no(key, held.get(key), shape) for key in ("label", "kto_tag")):
        raise ConversationError("its label says that its answer is not to be learnt")
    lost = {"prompt": ["input", "history", "context"], "instruction": ["context"]}
    said_before = lost.get(shape, ["history"] if shape in ("messages", "conversations") else [])
    if any(not says_nothing(held.get(key)) for key in said_before):
        raise ConversationError(f"it has one of {said_before}, which its shape does not read")
    if shape in ("text", "input_ids") and role_of(held.get("role")):
        raise ConversationError("it is a message")
    present = {key: value for key, value in held.items() if not says_nothing(value)}
    refuse_suspects(present, MATTERS, {*MATTERS, *KNOWN}, "record")
    if shape in ("text", "input_ids"):
        for key in (*SYSTEMS, "tools", "chat_template_kwargs"):
            if not says_nothing(held.get(key)):
                raise ConversationError(f"its {key} belongs to messages")


def _says_no(key: str, label: Any, shape: str) -> bool:
    """Whether a label of KTO says that the answer is bad."""
    if isinstance(label, str):
        return label.strip().lower() == "false"
    number = isinstance(label, Real) and not isinstance(label, bool)
    return label is False or (number and label == 0 and (key == "kto_tag" or shape == "prompt"))


def _messages(held: Mapping[str, Any], shape: str) -> list[Said]:
    """The messages of a record, none for text and tokens."""
    if shape in ("text", "input_ids"):
        return []
    if shape == "prompt":
        asked, answered = held["prompt"], held["completion"]
        asked = read_messages([{"role": "user", "content": asked}] if isinstance(asked, str) else asked)
        answers = read_messages([{"role": "assistant", "content": answered}] if isinstance(answered, str) else answered)
        messages = [message._replace(train=False) for message in asked] + answers
    else:
        messages = instructed(held) if shape == "instruction" else read_messages(held[shape])
    for key in SYSTEMS:
        if not says_nothing(held.get(key)):
            if messages[0].role in ("system", "developer"):
                raise ConversationError(f"it has a system message and {key}")
            text = held[key] if isinstance(held[key], str) else read_parts(held[key])
            messages.insert(0, Said("system", text, {}))
    return messages


def _weight(weight: Any) -> float:
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= float(weight) <= FLOAT32_MAX:
        raise ConversationError(f"weight is {weight!r}; it must be a number from 0 that float32 can hold")
    return float(weight)
