"""Write messages by a Hugging Face chat template, and try out what the template makes of them.

    messages, tools   ->   Writer.text()      ->   the text, and its {% generation %} marks
    marked messages   ->   Writer.outline()   ->   the same of marks, kept
                                                   hf_template.py compares the two

What a template wants and which tokens it writes is found once, at construction, with messages made here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nanopack.errors import ConversationError
from nanopack.render.hf_outline import kept_texts
from nanopack.render.hf_spans import Span, count_equal
from nanopack.tokenizers.added_tokens import any_of
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer

# As transformers looks for it.
GENERATION = re.compile(r"\{\%-?\s*generation\s*-?\%\}")
# Texts of prefixes that are kept: most conversations have the roles of one before.
MOST_OUTLINES = 1024
_CALL = {"name": "probe_call", "arguments": {"probe_key": "probe value"}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe description",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "probe text"}}},
    },
}
# A part of a list that is written as Python or JSON.
_LISTED = re.compile(r"""(['"])text\1:\s*(['"])Hi\2""")
_TALK = tuple({"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Oh")))


class Writer:
    """One chat template, with the tokenizer's special tokens as its variables."""

    as_parts: bool
    """Whether contents are written only as lists of parts, as in templates of models that see."""
    controls: frozenset[str]
    """Tokens that no message may hold: the special ones, and what the template writes around any message."""
    spoken: frozenset[str]
    """Tokens that only what the assistant says may hold: the brackets of thoughts and calls."""
    kept: list[str]
    """Texts that the template may look for in a message."""
    variables: dict[str, Any]
    """What the template is always given."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        """Try the template out; ValueError where it writes a date that cannot be fixed."""
        self._tokenizer = tokenizer
        self.variables = dict(tokenizer.chat.special_tokens_map)
        self._outlines: dict[str, str | None] = {}
        self.sources = tokenizer.chat_template() + tokenizer.chat_template(tools=True)
        self.kept = kept_texts(self.sources)
        self._talk: tuple[dict[str, Any], ...] = _TALK
        self.as_parts = self._wants_parts()
        self.controls, self.spoken = self._find_controls()

    def source(self, tools: Sequence[Any] | None) -> str:
        """Return the template for messages with or without tools: there may be two."""
        return self._tokenizer.chat_template(tools=tools is not None)

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        given: Mapping[str, Any],
        *,
        prompt: bool = False,
    ) -> tuple[str, list[Span] | None]:
        """Return the text, and from where to where it is marked; None where the template has no marks."""
        import transformers.utils.chat_template_utils as of_transformers

        render: Any = of_transformers.render_jinja_template
        source = self.source(tools)
        marked = GENERATION.search(source) is not None and not prompt
        try:
            texts, spans = render(
                conversations=[messages],
                tools=tools,
                chat_template=source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **{**self.variables, **given},
            )
        except MemoryError:
            raise
        # A template is a program of its own: what it raises can be anything.
        except Exception as error:
            what = next(iter(str(error).splitlines()), "")
            raise ConversationError(
                f"the tokenizer's chat template refuses it: {type(error).__name__}: {what}"
            ) from error
        return texts[0], [(begin, end) for begin, end in spans[0] if begin < end] if marked else None

    def outline(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        given: Mapping[str, Any] | None = None,
        *,
        prompt: bool = False,
    ) -> str | None:
        """Return the text that the template writes, None where it refuses; cached by its arguments."""
        key = repr((messages, tools, given, prompt))
        if key not in self._outlines:
            if len(self._outlines) >= MOST_OUTLINES:
                self._outlines.clear()
            try:
                self._outlines[key] = self.text(messages, tools, given or {}, prompt=prompt)[0]
            except ConversationError:
                self._outlines[key] = None
        return self._outlines[key]

    def prompt(self) -> str:
        """Return the text that asks for an answer."""
        asked, alone = (self.outline(self._talk[:1], prompt=prompt) or "" for prompt in (True, False))
        same = count_equal(asked, alone)
        starts = [
            match.start() for match in any_of(self.controls).finditer(asked) if match.start() <= same < match.end()
        ]
        return asked[starts[0] if starts else same :]

    @functools.cached_property
    def arguments_as_text(self) -> bool:
        """Whether calls survive only with their arguments as JSON text. Tried out once, with a call of our own."""
        calls = {**self._talk[1], "content": [] if self.as_parts else ""}
        mapped = self.outline([self._talk[0], {**calls, "tool_calls": [_call_of(_CALL)]}]) or ""
        if "probe_call" in mapped and "probe value" in mapped and "{'probe_key'" not in mapped:
            return False
        text = json.dumps(_CALL["arguments"])
        written = self.outline([self._talk[0], {**calls, "tool_calls": [_call_of({**_CALL, "arguments": text})]}])
        return text in (written or "")

    @functools.cached_property
    def writes_tools(self) -> bool:
        """Whether all of a tool is written: name, description and parameters."""
        text = self.outline(self._talk[:1], [_TOOL]) or ""
        return all(what in text for what in ("probe_tool", "probe description", "probe_key"))

    def _wants_parts(self) -> bool:
        """Return whether contents are written only as lists of parts, as in templates of models that see."""
        if (text := self.outline(self._talk)) and "Hi" in text and "Oh" in text:
            return False
        parts = tuple({**m, "content": [{"type": "text", "text": m["content"]}]} for m in self._talk)
        text = self.outline(parts)
        # nor is a list of parts that is written as it stands a text
        if not (text and "Hi" in text and "Oh" in text) or _LISTED.search(text):
            return False
        self._talk = parts
        return True

    def _find_controls(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the tokens that no message may hold, and those that only what the assistant says may.

        Special tokens and what the template writes around any message are the first; the rest of the added tokens that
        it uses, and a thought's brackets, the second.
        """
        flagged = self._tokenizer.special_tokens
        talks = [self.outline(self._talk * 2, prompt=prompt) for prompt in (False, True)]
        if not any(talks):
            talks = [self.outline(self._talk), self.outline(self._talk[:1], prompt=True)]
        around = "".join(text or "" for text in talks)
        source = self._tokenizer.chat_template(tools=True) + self._tokenizer.chat_template(tools=False) + around
        used = {token for token in self._tokenizer.added_tokens if token in source and not token.isspace()}
        written = {token for token in used if token in around and not thinks(token)}
        controls = frozenset(flagged | written)
        return controls, frozenset(used - controls)


def _call_of(function: Mapping[str, Any]) -> dict[str, Any]:
    # Nine letters and digits, as Mistral's templates want them.
    return {"id": "call00001", "type": "function", "function": dict(function)}


def thinks(token: str) -> bool:
    """Return whether the token is a bracket of a thought."""
    return "think" in token.lower()
