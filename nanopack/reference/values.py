"""The slow packer's values: whatever JSON, Python, Arrow, pandas and numpy write, as plain lists, dicts and strings.

A part of the definition. It shares nothing with the fast path but the name of an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

from nanopack.errors import ConversationError

MEDIA_WORDS = {"image", "images", "video", "videos", "audio", "audios", "pixel", "picture", "pictures", "photo"}
MEDIA_WORDS |= {"photos"}
LOSS_WORDS = {"train", "trained", "training", "trainable", "loss", "mask", "masks", "masked", "weight", "weights"}
LOSS_WORDS |= {"label", "labels", "learn", "learned", "learnt", "learnable", "supervised", "supervise", "supervision"}
LOSS_WORDS |= {"ignore", "ignored", "skip", "skipped", "exclude", "excluded", "backprop", "grad", "gradient"}
# With one of these a weight may be any number.
WEIGHT_WORDS = {"example", "sample", "instance", "conversation", "record", "row", "token", "dataset", "sampling"}
WEIGHT_WORDS |= {"mixture", "importance", "loss", "training", "train"}
THOUGHT_WORDS = {"reasoning", "thinking", "think", "thought", "thoughts", "cot", "rationale", "scratchpad"}
THOUGHT_WORDS |= {"monologue"}
TOOL_WORDS = {"tool", "tools", "function", "functions"}
SYSTEM_WORDS = {"system", "sys", "developer"}
TEXT_WORDS = {"prompt", "prompts", "message", "messages", "instruction", "instructions", "content", "text", "msg"}
# What is said about a thought, a tool or a system prompt.
ABOUT_WORDS = {"id", "ids", "name", "names", "type", "types", "model", "models", "time", "tokens", "count", "num"}
ABOUT_WORDS |= {"number", "length", "len", "effort", "budget", "level", "mode", "language", "lang", "choice"}
ABOUT_WORDS |= {"status", "required", "enabled", "version", "source", "score", "quality", "style", "format"}
ABOUT_WORDS |= {"category", "hash"}


def is_nan(key: str, value: object) -> bool:
    """Whether the value of a key is pandas' NaN, which stands for null."""
    return isinstance(value, float) and value != value and key != "weight"


def is_none(value: object) -> bool:
    """Whether the value is null, of Python or pandas."""
    return value is None or str(type(value)).endswith(".NAType'>")


def scalar(value: Any) -> Any:
    """A value without the numpy or torch scalar that holds it."""
    return value.item() if type(value).__module__ in ("numpy", "torch") and value.shape == () else value


def says_nothing(value: Any) -> bool:
    """Whether a value counts as absent, also as JSON text."""
    if isinstance(value, str):
        return value.strip() in ("[]", "{}", "null", '""') or value == ""
    if isinstance(value, (list, tuple, Mapping)) or type(value).__name__ == "ndarray":
        return len(value) == 0
    return is_none(value) or str(value) == "NaT" or (isinstance(value, Real) and bool(value != value))


def refuse_suspects(held: Mapping[Any, Any], matters: set[str], known: set[str], of: str) -> None:
    """Raise ConversationError for a key that is not known, and by its name and value may matter; `of` a record, ..."""
    for name, value in held.items():
        if name in known:
            continue
        words = words_of(name)
        if "_".join(words) in matters:
            raise ConversationError(f"its {name} is another spelling of a key that matters")
        if _may_matter(words, value, of):
            raise ConversationError(f"its {name} may matter")


def words_of(name: Any) -> list[str]:
    """The words of a key, in lower case."""
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower()
    return [word for word in re.split("[^a-z]+", snake) if word]


def _may_matter(words: list[str], value: Any, of: str) -> bool:
    def any_of(others: set[str]) -> bool:
        return any(word in others for word in words)

    if any_of(LOSS_WORDS):
        weighs = {*words} == {"weights"} or (any_of({"weight", "weights"}) and any_of(WEIGHT_WORDS))
        scales = "loss" in words and any_of({"scale", "factor", "multiplier"})
        return _says_yes_or_no(value) or (isinstance(value, Real) and (weighs or scales))
    if any_of(MEDIA_WORDS):
        return value is True or not isinstance(value, Real)
    if any_of(ABOUT_WORDS) or isinstance(value, Real) or _says_yes_or_no(value):
        return False
    if any_of(THOUGHT_WORDS):
        return True
    if of == "record":
        alone = len({*words}) == 1
        if words == ["preamble"] or (any_of(SYSTEM_WORDS) and (alone or any_of(TEXT_WORDS))):
            return True
        return any_of(TOOL_WORDS) and _is_structured(value)
    return any_of(TOOL_WORDS) and not (words in (["tool"], ["function"]) and isinstance(value, str))


def _is_structured(value: Any) -> bool:
    value = plain(value)
    if isinstance(value, list):
        return value != [] and _is_structured(value[0])
    return isinstance(value, dict) or (isinstance(value, str) and value.lstrip().startswith(("{", "[")))


def _says_yes_or_no(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower() in ("true", "false", "yes", "no", "0", "1")
    if isinstance(value, Real):
        return value in (0, 1)
    if isinstance(value, (list, tuple)):
        return isinstance(value[0], Real)
    return getattr(getattr(value, "dtype", "O"), "kind", "i" if hasattr(value, "dtype") else "O") in "biuf"


def is_object_array(value: Any) -> bool:
    """Whether it is a numpy array of Python objects, which pandas makes of lists."""
    return type(value).__module__ == "numpy" and str(getattr(value, "dtype", "")) == "object" and value.ndim == 1


def plain(value: Any, of_array: bool = False) -> Any:
    """Arrays and mappings as lists and dicts. Arrays come from Arrow through pandas: in them null means absent."""
    if type(value).__module__ in ("numpy", "torch"):
        return plain(value.tolist(), True)
    if isinstance(value, (list, tuple)):
        return [plain(item, of_array) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item, of_array) for key, item in value.items() if not (of_array and item is None)}
    return value


def as_list(value: Any) -> Any:
    """A list for an object array, or for a dict of lists of one length; anything else as it is."""
    if is_object_array(value):
        return plain(value)
    if isinstance(value, Mapping) and any(key in value for key in ("content", "value", "text")):
        columns = {key: as_list(column) for key, column in value.items() if column is not None}
        if all(isinstance(c, (list, tuple)) for c in columns.values()) and len({len(c) for c in columns.values()}) == 1:
            length = len(next(iter(columns.values())))
            return [{key: c[i] for key, c in columns.items() if c[i] is not None} for i in range(length)]
    return value


def parse_json(value: Any) -> Any:
    """What a JSON text holds; any other value as plain lists and dicts."""
    if not isinstance(value, str):
        return plain(value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{value[:40]!r} is not JSON") from error


def list_of_dicts(value: Any) -> list[Any]:
    """Tools or tool calls, of which the list or each item may be JSON text."""
    items = parse_json(value)
    items = [parse_json(item) for item in items] if isinstance(items, list) else items
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ConversationError("its tools or tool_calls must be a list of dicts")
    return items


def string(text: object, name: str) -> str:
    """The text; ConversationError, with the name of its key, where it is no string."""
    if not isinstance(text, str):
        raise ConversationError(f"its {name} must be a string")
    return text
