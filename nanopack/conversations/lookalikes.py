"""Recognize unknown keys that look like ones that matter.

    key, value   ->   looks_like()   ->   what the key looks like, or ""   ->   records.py, messages.py refuse it
                      keys.py knows the others                                  arrow.py reads such columns

Words in the name say what it may be, and the value says whether it is: a flag, numbers, a text, a list of dicts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

from nanopack.conversations.keys import HARMLESS, MESSAGE, PACKED, PART, PASSED, READ, RECORD, WANTED

# Words in a name that make an unknown key one that may matter, if its value is a flag, or numbers.
_OF_LOSS = {"train", "trained", "training", "trainable", "loss", "mask", "masks", "masked", "weight", "weights"}
_OF_LOSS |= {"label", "labels", "learn", "learned", "learnt", "learnable", "supervised", "supervise", "supervision"}
_OF_LOSS |= {"ignore", "ignored", "skip", "skipped", "exclude", "excluded", "backprop", "grad", "gradient"}
# Next to one of these a weight may be any number, and not 0 and 1 alone: example_weight; and a loss: loss_scale.
_OF_WEIGHTS = {"example", "sample", "instance", "conversation", "record", "row", "token", "dataset", "sampling"}
_OF_WEIGHTS |= {"mixture", "importance", "loss", "training", "train"}
_OF_SCALES = {"scale", "factor", "multiplier"}
# And these, whatever the value.
_OF_MEDIA = {"image", "images", "video", "videos", "audio", "audios", "pixel", "picture", "pictures", "photo", "photos"}
_OF_THOUGHTS = {"reasoning", "thinking", "think", "thought", "thoughts", "cot", "rationale", "scratchpad", "monologue"}
_OF_TOOLS = {"tool", "tools", "function", "functions"}
_OF_SYSTEM = {"system", "sys", "developer"}
_OF_TEXTS = {"prompt", "prompts", "message", "messages", "instruction", "instructions", "content", "text", "msg"}
# With one of these a name is about a thought, a tool or a system prompt, and does not hold it.
_ABOUT = {"id", "ids", "name", "names", "type", "types", "model", "models", "time", "tokens", "count", "num", "number"}
_ABOUT |= {"length", "len", "effort", "budget", "level", "mode", "language", "lang", "choice", "status", "required"}
_ABOUT |= {"enabled", "version", "source", "score", "quality", "style", "format", "category", "hash"}
_WORD = re.compile(r"[A-Z]*[a-z]+|[A-Z]+")
_YES_NO = {"true", "false", "yes", "no", "0", "1"}
_TABLES = {"record": RECORD, "message": MESSAGE, "part": PART}


@functools.lru_cache(maxsize=4096)
def may_look_like(key: str, table: str) -> str:
    """The known key that an unknown one of a "record", "message" or "part" looks like by name, or "loss", "media", "".

    >>> may_look_like("toolCalls", "message"), may_look_like("isTrained", "message"), may_look_like("mood", "message")
    ('tool_calls', 'loss', '')
    >>> may_look_like("rationale", "message"), may_look_like("sys_prompt", "record"), may_look_like("cot_id", "record")
    ('reasoning_content', 'system', '')
    """
    words = [word.lower() for word in _WORD.findall(key)]
    own = {*words}
    if _TABLES[table].get("_".join(words), READ) not in (READ, HARMLESS, PASSED, PACKED, WANTED):
        return "_".join(words)
    if own & _OF_LOSS:
        return "loss"
    if own & _OF_MEDIA:
        return "media"
    if own & _ABOUT:
        return ""
    if own & _OF_THOUGHTS:
        return "reasoning_content"
    if table == "record" and ((own & _OF_SYSTEM and (own & _OF_TEXTS or len(own) == 1)) or own == {"preamble"}):
        return "system"
    if own & _OF_TOOLS:
        return "tools" if table == "record" else "tool_calls"
    return ""


def looks_like(key: str, value: Any, table: str) -> str:
    """The known key that an unknown one with this value looks like, or "loss", "media" or ""; as `may_look_like`."""
    like = may_look_like(key, table)
    if like == "loss":
        return like if is_flag(value) or (isinstance(value, Real) and _is_weight(key)) else ""
    if like == "media":
        # the number of images is not an image
        return like if value is True or not isinstance(value, Real) else ""
    if like in ("reasoning_content", "system", "tool_calls", "tools") and "_".join(_words(key)) != like:
        return like if _says_something(key, value, like) else ""
    return like


def _words(key: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(key)]


def _is_weight(key: str) -> bool:
    own = {*_words(key)}
    weighs = own & {"weight", "weights"} and own & _OF_WEIGHTS
    return own == {"weights"} or bool(weighs or ("loss" in own and own & _OF_SCALES))


def _says_something(key: str, value: Any, like: str) -> bool:
    """Return whether the value of a key that may be a thought, a call, tools or a system prompt can be one."""
    if isinstance(value, Real) or is_flag(value):
        return False
    # the tool or function of a message is its name
    named = like == "tool_calls" and isinstance(value, str) and _words(key) in (["tool"], ["function"])
    return not named if like != "tools" else _holds_dicts(value)


def _holds_dicts(value: Any) -> bool:
    """Return whether it is a dict or a list of dicts, also as JSON text."""
    if isinstance(value, str):
        return value.lstrip()[:1] in ("{", "[")
    if hasattr(value, "tolist"):
        value = value.tolist()
    return isinstance(value, Mapping) or (isinstance(value, (list, tuple)) and any(map(_holds_dicts, value[:1])))


def is_flag(value: Any) -> bool:
    """Return whether a value may say what is in the loss: yes or no, 0 or 1, or numbers in a row."""
    if isinstance(value, str):
        return value.lower() in _YES_NO
    if isinstance(value, Real):
        return value in (0, 1)
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and isinstance(value[0], Real)
    # of torch a dtype has no kind, and is numbers
    return hasattr(value, "dtype") and getattr(value.dtype, "kind", "i") in "biuf"
