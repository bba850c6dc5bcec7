"""The slow packer's template="hf": a tokenizer's own chat template, read as text, and what in it is in the loss.

    messages   ->   Chat.tokens()   ->   (id, in the loss)
                                         documents.py hands them on

A part of the definition, written apart from the fast path. The template is run on the messages and once more on names
in place of their strings; a pattern made of the second text must match the first, and its groups are where the
strings stand.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nanopack.errors import ConversationError
from nanopack.reference.chat_writer import ChatWriter, Said, mend
from nanopack.reference.messages import WRITTEN_BY_HF
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer

# What may be left out once its turn is not the last.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts", "thought", "tool_plan")
NAME = re.compile(r"ZQX(\d{5})QXZ|918273(\d{5})(?:\.5)?")


class Chat:
    """One chat template."""

    def __init__(self, coder: HuggingFaceTokenizer) -> None:
        """`coder` has a chat template."""
        self.writer = ChatWriter(coder)

    def tokens(self, messages: Sequence[Said], tools: Any, given: Any) -> list[tuple[int, bool]]:
        """Return the tokens (id, in the loss) of a conversation."""
        tools, given = mend(tools) or None, mend(given) or {}
        source = "".join(self.writer.coder.chat_template(tools=with_tools) for with_tools in (False, True))
        for index, (_, _, rest, _) in enumerate(messages):
            for key, value in rest.items():
                if value is True and key in WRITTEN_BY_HF and not re.search(rf"\b{key}\b", source):
                    raise ConversationError(f"message {index}: the chat template does not read its {key}")
        said = self.writer.given(messages, tools, given)
        marked, text = self.writer.spans_and_text(said, tools, given, False)
        named, strings = self._named(said)

        @functools.cache
        def outline(count: int, ask: bool = False) -> str | None:
            return self.writer.try_write(named[:count], tools, given, ask)

        whole = outline(len(named))
        where = None if whole is None else _match(whole, text, strings)
        present = set(range(len(strings))) if whole is None else {number for number, _ in _names(whole)}
        if where is None:
            present = {n for n in present if any(form in text for form in _forms(strings[n][2]))}
        for number, (index, key, string, thought) in enumerate(strings):
            if number in present or string == "":
                continue
            later = index + 1 < len(named)
            if thought and later and any(number == n for n, _ in _names(outline(index + 1) or "")):
                continue
            raise ConversationError(f"message {index}: the chat template loses {string!r} of its {key}")
        if self.writer.is_marked(tools):
            spans = self._marked(text, marked, messages, strings, where)
        elif where is None:
            raise ConversationError("what is written of it cannot be followed")
        else:
            spans = [
                self._answer(index, text, where, strings, outline)
                for index, (role, _, _, trains) in enumerate(messages)
                if role == "assistant" and trains
            ]
        in_loss = [any(begin <= at < end for begin, end in spans) for at in range(len(text))]
        # a tokenizer may be set to split them where it is called without a word on it
        given = {"add_special_tokens": False, "split_special_tokens": False, "return_offsets_mapping": True}
        encoded = self.writer.coder.chat(text, **given)
        return [
            (id, _is_said(spans, in_loss, begin, end))
            for id, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _named(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[int, str, Any, bool]]]:
        """Return the messages with names in place of strings, and for each name: message, key, string, a thought?"""
        strings: list[tuple[int, str, Any, bool]] = []

        def name(index: int, key: str, value: Any, thought: bool) -> Any:
            if isinstance(value, Mapping):
                return {k: name(index, key, v, thought) for k, v in value.items()}
            if isinstance(value, (list, tuple)):
                return [name(index, key, v, thought) for v in value]
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                return value
            if not isinstance(value, str):
                strings.append((index, key, value, thought))
                return 91827300000 + len(strings) - 1 + (0.5 if isinstance(value, float) else 0)
            if not value.strip():
                return value
            strings.append((index, key, value.strip(), thought))
            front, back = value[: len(value) - len(value.lstrip())], value[len(value.rstrip()) :]
            return f"{front}ZQX{len(strings) - 1:05}QXZ{back}"

        def name_text(index: int, text: str, assistant: bool) -> str:
            named, plain, kept = "", "", []
            pieces: list[tuple[bool, str]] = []
            while text:
                found = next((t for t in self.writer.kept_texts if text.startswith(t)), None)
                if found is None:
                    plain, text = plain + text[0], text[1:]
                    continue
                pieces += [(False, plain), (True, found)]
                kept.append(found)
                plain, text = "", text[len(found) :]
            pieces.append((False, plain))
            if not any(piece.strip() for is_kept, piece in pieces if not is_kept):
                return str(name(index, "content", "".join(piece for _, piece in pieces), False))
            # A thought stands between <think> and </think>; the prompt may have written the first.
            thoughts = [text for text in kept if "think" in text.lower()]
            thinking = assistant and thoughts[:1] != [] and thoughts[0].startswith("</")
            for is_kept, piece in pieces:
                if is_kept and "think" in piece.lower():
                    thinking = assistant and not piece.startswith("</")
                named += piece if is_kept else name(index, "content", piece, thinking)
            return named

        found = []
        for index, message in enumerate(messages):
            new, before = dict(message), len(strings)
            assistant = message["role"] == "assistant"
            for key, value in message.items():
                if key == "content":
                    text = value[0]["text"] if self.writer.parts else value
                    text = name_text(index, text, assistant)
                    new[key] = [{"type": "text", "text": text}] if self.writer.parts else text
                elif key in ("tool_calls", "function_call"):
                    calls = value if key == "tool_calls" else [value]
                    calls = [_in_call(call, lambda v, k=key, i=index: name(i, k, v, False)) for call in calls]
                    new[key] = calls if key == "tool_calls" else calls[0]
                elif key in WRITTEN_BY_HF:
                    new[key] = name(index, key, value, key in THOUGHTS)
            if assistant and len(strings) == before:
                strings.append((index, "content", "", False))
                empty = f"ZQX{len(strings) - 1:05}QXZ"
                new["content"] = [{"type": "text", "text": empty}] if self.writer.parts else new["content"] + empty
            found.append(new)
        return found, strings

    def _marked(
        self, text: str, marked: Any, messages: Sequence[Said], strings: Any, where: Any
    ) -> list[tuple[int, int]]:
        joined: list[list[int]] = []
        for begin, end in sorted(span for span in marked if span[0] < span[1]):
            if joined and joined[-1][1] == begin:
                joined[-1][1] = end
            else:
                joined.append([begin, end])
        kept = []
        for begin, end in joined:
            if all(trains for *_, trains in messages):
                kept.append((begin, end))
                continue
            if where is None:
                raise ConversationError("whose {% generation %} it is cannot be found")
            inside = {strings[number][0] for number, at, _ in where if begin <= at < end}
            if not inside:
                before = [strings[number][0] for number, _, to in where if to <= begin]
                inside = set(before[-1:])
            trains = {messages[index][3] for index in inside}
            if len(trains) > 1:
                raise ConversationError("one {% generation %} holds messages of both kinds")
            if trains != {False}:
                kept.append((begin, end))
        ends = tuple(t for t in self.writer.control if "think" not in t.lower())
        for begin, end in kept:
            if not text[begin:end].rstrip().endswith(ends) and text[end:].lstrip().startswith(ends):
                raise ConversationError("the token that ends an answer stands outside {% generation %}")
        return kept

    def _answer(self, index: int, text: str, where: Any, strings: Any, outline: Any) -> tuple[int, int]:
        """Return the answer's begin and end in the text."""
        mine = [i for i, (number, _, _) in enumerate(where) if strings[number][0] == index]
        if not mine:
            raise ConversationError(f"message {index}: nothing is written of it")
        first = last = mine[0]
        seen = []
        for i in range(first, len(where)):
            if strings[where[i][0]][0] != index:
                break
            if where[i][0] not in seen:
                seen.append(where[i][0])
                last = i
        if {where[i][0] for i in mine} != set(seen):
            raise ConversationError(f"message {index}: it is written among others")
        header = text[where[first - 1][2] if first else 0 : where[first][1]]
        asked = _tail(outline(index, True), where[first - 1][0] if first else None)
        if asked is None:
            raise ConversationError(
                f"message {index}: what is before it is written in another way when it is asked for"
            )
        same = 0
        while same < min(len(asked), len(header)) and asked[same] == header[same]:
            same += 1
        ends = [found.end() for found in self._controls().finditer(asked)]
        least = ends[-1] if ends else min(len(asked), len(header))
        at = 0
        for word in re.split(r"(?=[<\[\s])|(?<=[>\]\s])", asked):
            # a bracket of a thought is in both, or in the prompt alone
            if at < same < at + len(word) and re.search("think|thought", word, re.IGNORECASE):
                same = at
            at += len(word)
        rest = asked[same:].strip()
        if rest and not re.match(r"[^\s\]]*(think|thought)", rest, re.IGNORECASE):
            raise ConversationError(f"message {index}: it begins in another way than it is asked for")
        if same < least or (self._prompt() and self._prompt() in header[same:]):
            raise ConversationError(f"message {index}: it begins in another way than it is asked for")
        begin = where[first][1] - len(header) + same
        footer = text[where[last][2] : where[last + 1][1] if last + 1 < len(where) else len(text)]
        alone = _tail(outline(index + 1), where[last][0])
        if alone is None:
            raise ConversationError(f"message {index}: it is written in another order once others follow")
        return begin, where[last][2] + self._end(index, footer, alone)

    def _end(self, index: int, footer: str, alone: str) -> int:
        """Return how much of what follows an answer ends it."""
        here, there = ([(m.start(), m.end(), m[0]) for m in self._controls().finditer(s)] for s in (footer, alone))
        ended, at, other = 0, 0, 0
        for mine, its in zip(here, there, strict=False):
            if footer[at : mine[0]] != alone[other : its[0]] or mine[2] != its[2]:
                break
            at, other = mine[1], its[1]
            ended = at
        if ended:
            return ended
        if here:
            gap = footer[: here[0][0]]
            if there and (gap == alone[: there[0][0]] or not (gap + alone[: there[0][0]]).strip()):
                return here[0][1]
            if here[0][2] in self.writer.coder.stop_tokens and not gap.strip():
                return here[0][1]
        raise ConversationError(f"message {index}: no special token ends it")

    def _controls(self) -> re.Pattern[str]:
        tokens = sorted((t for t in self.writer.control if "think" not in t.lower()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def _prompt(self) -> str:
        """Return the text that asks for an answer."""
        asked, same = self.writer.asking, 0
        while same < min(len(asked), len(self.writer.question)) and asked[same] == self.writer.question[same]:
            same += 1
        tokens = sorted(self.writer.control, key=len, reverse=True)
        for found in re.finditer("|".join(map(re.escape, tokens)) or r"(?!)", asked):
            if found.start() <= same < found.end():
                same = found.start()
        return asked[same:]


def _in_call(call: Any, name: Any) -> dict[str, Any]:
    function = call.get("function", call)
    function = {k: name(v) if k in ("name", "arguments") else v for k, v in function.items()}
    return {**call, "function": function} if "function" in call else function


def _names(text: str) -> list[tuple[int, re.Match[str]]]:
    return [(int(found[1] or found[2]), found) for found in NAME.finditer(text)]


def _tail(outline: str | None, number: int | None) -> str | None:
    """Return the text after the last name of an outline, if that is the one."""
    names = _names(outline or "")
    if outline is None or (names[-1][0] if names else None) != number:
        return None
    return outline[names[-1][1].end() :] if names else outline


def _match(outline: str, text: str, strings: Any) -> list[tuple[int, int, int]] | None:
    """Return for each name of the outline its number, and where in the text its string begins and ends."""
    names, at, pattern = _names(outline), 0, ""
    for number, found in names:
        if number >= len(strings):
            return None
        forms = _forms(strings[number][2])
        pattern += re.escape(outline[at : found.start()]) + "(" + "|".join(map(re.escape, forms)) + ")"
        at = found.end()
    matched = re.fullmatch(pattern + re.escape(outline[at:]), text)
    if matched is None:
        return None
    return [(number, *matched.span(group)) for group, (number, _) in enumerate(names, start=1)]


def _forms(string: Any) -> list[str]:
    """Return the ways to write a string or a number."""
    if isinstance(string, str):
        return [string, json.dumps(string, ensure_ascii=False)[1:-1], json.dumps(string)[1:-1]]
    return [json.dumps(string), str(string)]


def _is_said(spans: Any, in_loss: Sequence[bool], begin: int, end: int) -> bool:
    """Return whether a token has a character in the loss; an empty one must stand inside a span."""
    return any(in_loss[begin:end]) if begin < end else any(a < begin < b for a, b in spans)
