"""Find where each string of a conversation stands in the text that a chat template writes.

    messages   ->   outline()   ->   the same with marks for strings   ->   the template   ->   locate()
                                                                             writes both        where each string is

A template is a program: it may strip, escape, reorder or leave out what it is given. It is run on the messages and on
marks in place of their strings; the second text is the outline of the first, and says where each string went or that
it went nowhere. Nothing is tokenized here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nanopack.conversations.keys import MESSAGE, TEMPLATE

# Letters and digits survive every escape; numbers stay numbers, for templates that ask what they are.
_MARK = re.compile(r"ZQX(\d{5})QXZ|918273(\d{5})(?:\.5)?")
_CALLS = ("tool_calls", "function_call")
# A thought may be dropped once the next question was asked.
_THOUGHTS = {"reasoning_content", "reasoning", "thinking", "thoughts", "thought", "tool_plan"}
_TAG = r"</?[^<>\s'\"/{%][^<>\s'\"{%]{0,40}>"
# Texts that a template looks for in what it is given: 'x' in content, content.split('x').
_LOOKED_FOR = re.compile(
    r"(['\"])((?:(?!\1).)+)\1\s*(?:not\s+)?in\b|\.(?:split|startswith|endswith|replace|find)\(\s*(['\"])((?:(?!\3).)+)\3"
)


class Leaf(NamedTuple):
    """A string or number of a message, without the white space around it."""

    message: int
    key: str
    """What holds it, such as 'content' or 'tool_calls'."""
    value: str | int | float
    thought: bool


class Place(NamedTuple):
    """Where a leaf stands: characters begin to end of the text."""

    leaf: int
    begin: int
    end: int


def kept_texts(template: str) -> list[str]:
    """Return the texts that the template may look for in a message; an outline keeps them."""
    found = {"<think>", "</think>", *re.findall(_TAG, template)}
    for match in _LOOKED_FOR.finditer(template):
        found.add(match[2] or match[4])
    return sorted((text for text in found if len(text) > 1 and "\\" not in text), key=len, reverse=True)


def markers(texts: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that finds these texts."""
    return re.compile(f"({'|'.join(map(re.escape, texts))})" if texts else r"((?!))")


def outline(messages: Sequence[Mapping[str, Any]], marker: re.Pattern[str]) -> tuple[list[dict[str, Any]], list[Leaf]]:
    """Return the messages with marks in place of their strings, and what each mark, by its number, stands for."""
    leaves: list[Leaf] = []

    def mark(index: int, key: str, value: Any, thought: bool = False) -> Any:
        if isinstance(value, str):
            core = value.strip()
            if not core:
                return value
            begin = value.index(core[0]) if value[0].isspace() else 0
            leaves.append(Leaf(index, key, core, thought))
            return f"{value[:begin]}ZQX{len(leaves) - 1:05}QXZ{value[begin + len(core) :]}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            leaves.append(Leaf(index, key, value, thought))
            number = 91827300000 + len(leaves) - 1
            return number if isinstance(value, int) else number + 0.5
        if isinstance(value, Mapping):
            return {name: mark(index, key, item, thought) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [mark(index, key, item, thought) for item in value]
        return value

    def mark_text(index: int, text: str, speaks: bool) -> str:
        if not text.strip():
            return text
        parts = marker.split(text)
        if not any(map(str.strip, parts[::2])):
            return str(mark(index, "content", text))
        # What stands between <think> and </think>, or before the </think> of a thought that the prompt began.
        brackets = [part for part in parts[1::2] if "think" in part.lower()]
        thinking = speaks and bool(brackets) and brackets[0].startswith("</")
        for number, part in enumerate(parts):
            if number % 2 == 0:
                parts[number] = str(mark(index, "content", part, thinking))
            elif "think" in part.lower():
                thinking = speaks and not part.startswith("</")
        return "".join(parts)

    def mark_call(index: int, key: str, call: Mapping[str, Any]) -> dict[str, Any]:
        inner = dict(call.get("function", call))
        for name in ("name", "arguments"):
            if name in inner:
                inner[name] = mark(index, key, inner[name])
        return {**call, "function": inner} if "function" in call else inner

    marked = []
    for index, message in enumerate(messages):
        speaks, before = message["role"] == "assistant", len(leaves)
        new = dict(message)
        for key, value in message.items():
            if key == "content" and isinstance(value, str):
                new[key] = mark_text(index, value, speaks)
            elif key == "content":
                new[key] = [{**part, "text": mark_text(index, part["text"], speaks)} for part in value]
            elif key == "tool_calls":
                new[key] = [mark_call(index, key, call) for call in value]
            elif key == "function_call":
                new[key] = mark_call(index, key, value)
            elif MESSAGE.get(key) == TEMPLATE:
                new[key] = mark(index, key, value, key in _THOUGHTS)
        if speaks and len(leaves) == before:
            # Nothing is said, and where it is not said must be known all the same.
            leaves.append(Leaf(index, "content", "", thought=False))
            nothing = f"ZQX{len(leaves) - 1:05}QXZ"
            said = new["content"]
            new["content"] = said + nothing if isinstance(said, str) else [{"type": "text", "text": nothing}]
        marked.append(new)
    return marked, leaves


def marks(text: str) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each mark in an outline, and from where to where it stands."""
    for match in _MARK.finditer(text):
        yield int(match[1] or match[2]), match.start(), match.end()


def locate(text: str, outlined: str, leaves: Sequence[Leaf]) -> list[Place] | None:
    """Return the places of the leaves in the text, in its order; None where its outline is another one."""
    places: list[Place] = []
    at = copied = 0
    found = list(marks(outlined))
    ends = [begin for _, begin, _ in found[1:]] + [len(outlined)]
    for (leaf, begin, end), following in zip(found, ends, strict=False):
        if leaf >= len(leaves) or not text.startswith(outlined[copied:begin], at):
            return None
        at += begin - copied
        literal = outlined[end:following]
        for form in forms(leaves[leaf].value):
            if text.startswith(form, at) and text.startswith(literal, at + len(form)):
                break
        else:
            return None
        places.append(Place(leaf, at, at + len(form)))
        at, copied = at + len(form), end
    return places if text[at:] == outlined[copied:] else None


def forms(value: str | float) -> Iterator[str]:
    """Yield the ways in which a template may write it."""
    if not isinstance(value, str):
        yield from (json.dumps(value), str(value))
        return
    yield value
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield json.dumps(value)[1:-1]
