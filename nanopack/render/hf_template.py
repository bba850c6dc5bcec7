"""Render messages by the chat template that a Hugging Face tokenizer carries: template="hf".

    Conversation   ->   ChatTemplate()   ->   ids and mask
                                              renderer.py makes a document of them

The ids are those of `apply_chat_template`; no bos is added to what the template writes. What is in the loss is what
the template marks with {% generation %}; where it marks nothing, the answers are found in its text (hf_spans.py).
Whatever a message says and the template does not write is an error (hf_outline.py finds it).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanopack.conversations.records import Conversation, Message, short
from nanopack.errors import ConversationError
from nanopack.render.hf_messages import mended, plain, strings
from nanopack.render.hf_outline import Leaf, Place, forms, locate, markers, marks, outline
from nanopack.render.hf_spans import Answers, Span, count_equal
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer

log = logging.getLogger("nanopack")

# As transformers looks for it.
GENERATION = re.compile(r"\{\%-?\s*generation\s*-?\%\}")
REMEDY = "give the tokenizer a chat_template with {% generation %} around what is in the loss, or use nanopack.Template"
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
_TALK = tuple({"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Oh")))


class ChatTemplate:
    """Gives ids, (n,) uint32, and mask, (n,) bool, of a conversation; ConversationError where the template loses some.

    `dropped_thoughts` counts the thoughts of earlier turns that the template left out.
    """

    def __init__(self, tokenizer: object) -> None:
        """ValueError where the tokenizer has no chat template, or one that writes a date which cannot be fixed."""
        chat = tokenizer.chat if isinstance(tokenizer, HuggingFaceTokenizer) else None
        if chat is None or not getattr(chat, "chat_template", None):
            raise ValueError(
                f"template='hf' is the chat template of a transformers tokenizer, and tokenizer {_name(tokenizer)!r} "
                "has none; set its chat_template, or use another template."
            )
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        self._chat = chat
        self._tokenizer = tokenizer
        self._variables = dict(chat.special_tokens_map)
        self._outlines: dict[str, str | None] = {}
        self._marker = markers(tokenizer.chat_template(tools=True) + tokenizer.chat_template(tools=False))
        self._talk: tuple[dict[str, Any], ...] = _TALK
        self._as_parts = self._wants_parts()
        self.controls, self.spoken = self._find_controls()
        self._never = _any_of(self.controls | self.spoken)
        self._never_said = _any_of(self.controls)
        ends = [token for token in self.controls if not _thinks(token)]
        self._answers = Answers(ends, tokenizer.stop_tokens, self._prompt(), self._remedy)
        self.dropped_thoughts = 0

    def __call__(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask."""
        messages = [self._plain(index, message) for index, message in enumerate(conversation.messages)]
        tools, given = self._checked_tools(conversation)
        text, marked = self._render(messages, tools, given)
        if not text:
            raise ConversationError("the tokenizer's chat template writes nothing for it")
        spans = self._spans(conversation, messages, text, marked)
        ids, characters = self._tokenizer.encode_whole(text)
        if not ids:
            raise ConversationError("the tokenizer's chat template writes nothing for it")
        begins, ends = np.array(characters, np.int64).T
        mask = np.zeros(len(ids), bool)
        for begin, end in spans:
            mask |= (ends > begin) & (begins < end)
        return np.array(ids, np.uint32), mask

    # What the template is given

    def _plain(self, index: int, message: Message) -> dict[str, Any]:
        rest = message.rest
        as_text = bool(rest and rest.get("tool_calls")) and self._arguments_as_text
        found = plain(index, message, as_parts=self._as_parts, arguments_as_text=as_text)
        own = message.role == "assistant"
        pattern = self._never_said if own else self._never
        for text in strings(found):
            if control := pattern.search(text):
                raise ConversationError(
                    f"message {index}: it holds the text {control[0]!r}, which template='hf' would make a special "
                    "token; other templates keep it text"
                )
        return found

    def _checked_tools(self, conversation: Conversation) -> tuple[list[Any] | None, dict[str, Any]]:
        """Return tools and other variables for the template; ConversationError where it does not read them."""
        tools, given = mended(conversation.tools) or None, mended(conversation.template_kwargs) or {}
        source = self._tokenizer.chat_template(tools=tools is not None)
        for name in given:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise ConversationError(
                    f"chat_template_kwargs has {name!r}, which the tokenizer's chat template does not read; remove it"
                )
        for text in strings([tools, given]):
            if control := self._never.search(text):
                raise ConversationError(
                    f"its tools or chat_template_kwargs hold the text {control[0]!r}, which template='hf' would make "
                    "a special token"
                )
        if tools and not self._writes_tools:
            raise ConversationError("the tokenizer's chat template does not write its tools; " + REMEDY)
        return tools, given

    @functools.cached_property
    def _arguments_as_text(self) -> bool:
        """Whether calls survive only with their arguments as JSON text. Tried out once, with a call of our own."""
        calls = {**self._talk[1], "content": [] if self._as_parts else ""}
        mapped = self._outline([self._talk[0], {**calls, "tool_calls": [_call_of(_CALL)]}]) or ""
        if "probe_call" in mapped and "probe value" in mapped and "{'probe_key'" not in mapped:
            return False
        text = json.dumps(_CALL["arguments"])
        written = self._outline([self._talk[0], {**calls, "tool_calls": [_call_of({**_CALL, "arguments": text})]}])
        return text in (written or "")

    @functools.cached_property
    def _writes_tools(self) -> bool:
        """Whether all of a tool is written: name, description and parameters."""
        text = self._outline(self._talk[:1], [_TOOL]) or ""
        return all(what in text for what in ("probe_tool", "probe description", "probe_key"))

    def _wants_parts(self) -> bool:
        """Return whether contents are written only as lists of parts, as in templates of models that see."""
        if (text := self._outline(self._talk)) and "Hi" in text and "Oh" in text:
            return False
        parts = tuple({**m, "content": [{"type": "text", "text": m["content"]}]} for m in self._talk)
        text = self._outline(parts)
        if not (text and "Hi" in text and "Oh" in text):
            return False
        self._talk = parts
        return True

    def _prompt(self) -> str:
        """Return what asks for an answer."""
        asked, alone = (self._outline(self._talk[:1], prompt=prompt) or "" for prompt in (True, False))
        same = count_equal(asked, alone)
        starts = [
            match.start() for match in _any_of(self.controls).finditer(asked) if match.start() <= same < match.end()
        ]
        return asked[starts[0] if starts else same :]

    def _find_controls(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the tokens that no message may hold, and those that only what the assistant says may.

        Special tokens and what the template writes around any message are the first; the rest of the added tokens that
        it uses, and a thought's brackets, the second.
        """
        flagged = self._tokenizer.special_tokens
        talks = [self._outline(self._talk * 2, prompt=prompt) for prompt in (False, True)]
        if not any(talks):
            talks = [self._outline(self._talk), self._outline(self._talk[:1], prompt=True)]
        around = "".join(text or "" for text in talks)
        source = self._tokenizer.chat_template(tools=True) + self._tokenizer.chat_template(tools=False) + around
        used = {token for token in self._tokenizer.added_tokens if token in source and not token.isspace()}
        written = {token for token in used if token in around and not _thinks(token)}
        controls = frozenset(flagged | written)
        return controls, frozenset(used - controls)

    # What it writes

    def _render(
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
        source = self._tokenizer.chat_template(tools=tools is not None)
        marked = GENERATION.search(source) is not None and not prompt
        try:
            texts, spans = render(
                conversations=[messages],
                tools=tools,
                chat_template=source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **{**self._variables, **given},
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

    def _outline(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        given: Mapping[str, Any] | None = None,
        *,
        prompt: bool = False,
    ) -> str | None:
        """Return what the template writes, None where it refuses; kept by what it is given."""
        key = repr((messages, tools, given, prompt))
        if key not in self._outlines:
            if len(self._outlines) >= MOST_OUTLINES:
                self._outlines.clear()
            try:
                self._outlines[key] = self._render(messages, tools, given or {}, prompt=prompt)[0]
            except ConversationError:
                self._outlines[key] = None
        return self._outlines[key]

    # What is in the loss

    def _spans(
        self,
        conversation: Conversation,
        messages: Sequence[Mapping[str, Any]],
        text: str,
        marked: list[Span] | None,
    ) -> list[Span]:
        """Return what is in the loss; ConversationError where something is lost, or the text does not say."""
        tools, given = mended(conversation.tools) or None, mended(conversation.template_kwargs) or {}
        outlined, leaves = outline(messages, self._marker)

        def written(count: int, *, prompt: bool = False) -> str | None:
            return self._outline(outlined[:count], tools, given, prompt=prompt)

        whole = written(len(outlined))
        places = None if whole is None else locate(text, whole, leaves)
        if whole is None:
            found = {number for number, leaf in enumerate(leaves) if any(form in text for form in forms(leaf.value))}
        else:
            found = {leaf for leaf, _, _ in marks(whole)}
        self._refuse_lost(messages, leaves, found, written)
        if marked is not None:
            return self._of_marks(conversation, text, marked, leaves, places)
        if places is None:
            raise ConversationError(
                "the chat template looks into what it is given, so what is in the loss cannot be found in its text; "
                + self._remedy()
            )
        return [
            self._answers.span(index, text, places, leaves, lambda i: written(i, prompt=True), lambda i: written(i + 1))
            for index, message in enumerate(conversation.messages)
            if message.role == "assistant" and message.train
        ]

    def _refuse_lost(
        self, messages: Sequence[Mapping[str, Any]], leaves: Sequence[Leaf], found: set[int], written: Any
    ) -> None:
        for number, leaf in enumerate(leaves):
            if number in found or leaf.value == "":
                continue
            if leaf.thought and leaf.message + 1 < len(messages):
                until = written(leaf.message + 1) or ""
                if any(number == mark for mark, _, _ in marks(until)):
                    self._report_dropped_thought(leaf)
                    continue
            raise ConversationError(
                f"message {leaf.message}: the chat template writes nothing of its {leaf.key}: {short(leaf.value)} is "
                f"lost; {self._remedy()}"
            )

    def _report_dropped_thought(self, leaf: Leaf) -> None:
        if not self.dropped_thoughts:
            log.info(
                "the chat template leaves out thoughts of earlier turns, first of message %d: %s; reported once",
                leaf.message,
                short(leaf.value),
            )
        self.dropped_thoughts += 1

    def _of_marks(
        self,
        conversation: Conversation,
        text: str,
        marked: list[Span],
        leaves: Sequence[Leaf],
        places: Sequence[Place] | None,
    ) -> list[Span]:
        joined = _join(marked, text)
        for span in joined:
            if self._answers.lacks_its_end(text, span):
                raise ConversationError(
                    f"{short(text[slice(*span)])} would be in the loss without the special token that ends it, so the "
                    "model would not stop; put that token inside {% generation %}"
                )
        if all(message.train for message in conversation.messages):
            return joined
        if places is None:
            raise ConversationError(
                "which message each {% generation %} belongs to cannot be found, and one of them is not to be in the "
                "loss; " + self._remedy()
            )
        return [span for span in joined if self._is_in_loss(conversation, span, leaves, places)]

    def _is_in_loss(
        self, conversation: Conversation, span: Span, leaves: Sequence[Leaf], places: Sequence[Place]
    ) -> bool:
        begin, end = span
        inside = {leaves[place.leaf].message for place in places if begin <= place.begin < end}
        before = [leaves[place.leaf].message for place in places if place.end <= begin]
        trains = {conversation.messages[index].train for index in inside or before[-1:]}
        if len(trains) > 1:
            raise ConversationError("one {% generation %} holds messages of which only some are to be in the loss")
        return trains != {False}

    def _remedy(self) -> str:
        return f"{REMEDY}{self._training_template}"

    @functools.cached_property
    def _training_template(self) -> str:
        return _training_template(self._tokenizer.chat_template())


def _join(spans: Sequence[Span], text: str) -> list[Span]:
    """Join spans with nothing but white space between them."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and not text[joined[-1][1] : begin].strip() and begin == joined[-1][1]:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return joined


def _training_template(source: str) -> str:
    """Name the template for training that trl has in place of this one, if it is installed and has one."""
    found = importlib.util.find_spec("trl")
    for folder in found.submodule_search_locations or () if found else ():
        for path in Path(folder, "chat_templates").glob("*.jinja"):
            trains = path.with_name(f"{path.stem}_training.jinja").exists()
            if trains and path.read_text(encoding="utf-8").strip() == source.strip():
                return "; trl.chat_template_utils.get_training_chat_template(tokenizer) returns one for this tokenizer"
    return ""


def _call_of(function: Mapping[str, Any]) -> dict[str, Any]:
    # Nine letters and digits, as Mistral's templates want them.
    return {"id": "call00001", "type": "function", "function": dict(function)}


def _thinks(token: str) -> bool:
    return "think" in token.lower()


def _any_of(tokens: frozenset[str]) -> re.Pattern[str]:
    names = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _name(tokenizer: object) -> str:
    return str(getattr(tokenizer, "name", type(tokenizer).__name__))
