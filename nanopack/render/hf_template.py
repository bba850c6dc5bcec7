"""Render messages by the chat template that a Hugging Face tokenizer carries: template="hf".

    Conversation   ->   ChatTemplate()   ->   Plan, or the Document where the tokenizer must encode it whole
                                              document.py encodes the plan

The ids are those of `apply_chat_template`; no bos is added to what the template writes. What is in the loss is what
the template marks with {% generation %}; where it marks nothing, the answers are found in its text (hf_spans.py).
Whatever a message says and the template does not write is an error (hf_outline.py finds it).
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanopack.conversations.keys import MESSAGE, TEMPLATE
from nanopack.conversations.records import Conversation, Message, short
from nanopack.errors import ConversationError, TemplateError
from nanopack.render.document import Document, Plan
from nanopack.render.hf_messages import mended, plain, strings
from nanopack.render.hf_nulls import refuse_nulls
from nanopack.render.hf_outline import Leaf, Place, forms, locate, markers, marks, outline
from nanopack.render.hf_runs import plan_of
from nanopack.render.hf_shapes import Shapes
from nanopack.render.hf_spans import Answers, Span
from nanopack.render.hf_watch import compiler
from nanopack.render.hf_writer import Writer, thinks
from nanopack.tokenizers.added_tokens import any_of
from nanopack.tokenizers.huggingface import SPOT_CHECK, HuggingFaceTokenizer

REMEDY = "give the tokenizer a chat_template with {% generation %} around what is in the loss, or use nanopack.Template"


class ChatTemplate:
    """Renders conversations; ConversationError where the template loses some of one, or the text is ambiguous."""

    def __init__(self, tokenizer: object) -> None:
        """ValueError where the tokenizer has no chat template, or one that writes a date which cannot be fixed."""
        chat = tokenizer.chat if isinstance(tokenizer, HuggingFaceTokenizer) else None
        if chat is None or not getattr(chat, "chat_template", None):
            raise ValueError(
                f"template='hf' is the chat template of a transformers tokenizer, and tokenizer {_name(tokenizer)!r} "
                "has none; set its chat_template (on disk: chat_template.jinja in its folder), or use another template."
            )
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        _check_templates(tokenizer)
        self._tokenizer = tokenizer
        self._rendered = 0
        self._has_blank_tokens = any(token != token.strip() for token in tokenizer.added_tokens)
        self._writer = Writer(tokenizer)
        self.controls = self._writer.controls
        self._marker = markers(self._writer.kept)
        self._never = any_of(self.controls | self._writer.spoken)
        self._never_said = any_of(self.controls)
        ends = [token for token in self.controls if not thinks(token)]
        self._shapes: Shapes | None = None
        if tokenizer.byte_level and not self._writer.as_parts:
            looked_for = [*self._writer.kept, *self.controls, *self._writer.spoken]
            self._shapes = Shapes(tokenizer, self._writer.variables, looked_for, self._plan_of_marks)
        self._answers = Answers(ends, tokenizer.stop_tokens, self._writer.prompt(), self._remedy)

    def __call__(self, conversation: Conversation) -> Plan | Document:
        """Return the plan of a document, or the document; ConversationError as the class says."""
        found = self._shapes.plan(conversation) if self._shapes else None
        if found is not None:
            plan, new = found
            self._rendered += 1
            if new or self._rendered % SPOT_CHECK == 1:
                return plan._replace(expected=self._encoded_whole(*self._written(conversation)))
            return plan
        text, spans, forgets = self._written(conversation)
        if not self._can_cut(text):
            return self._encoded_whole(text, spans, forgets)
        self._rendered += 1
        expected = self._encoded_whole(text, spans, forgets) if self._rendered % SPOT_CHECK == 1 else None
        return self._plan_of(text, spans)._replace(forgets=forgets, expected=expected)

    def _plan_of(self, text: str, spans: Sequence[Span]) -> Plan:
        encoding = self._tokenizer.byte_level
        trims = encoding is not None and encoding.leading is not None
        return plan_of(text, sorted(spans), self._tokenizer.cut(text), trims=trims)

    def _written(self, conversation: Conversation) -> tuple[str, list[Span], bool]:
        """Return the template's text, what of it is in the loss, and whether thoughts are left out."""
        messages = [self._plain(index, message) for index, message in enumerate(conversation.messages)]
        refuse_nulls(conversation.messages, conversation.tools)
        tools, given = self._checked_tools(conversation)
        text, marked = self._writer.text(messages, tools, given)
        if not text:
            raise ConversationError("the tokenizer's chat template writes nothing for it")
        return text, *self._spans(conversation, messages, tools, given, text, marked)

    def _plan_of_marks(self, messages: list[dict[str, Any]], conversation: Conversation) -> Plan | None:
        """Return the plan of marks in place of contents; ConversationError as a call raises it."""
        text, marked = self._writer.text(messages, None, {})
        if not text or not self._can_cut(text):
            return None
        spans, _ = self._spans(conversation, messages, None, {}, text, marked)
        return self._plan_of(text, spans)

    def _can_cut(self, text: str) -> bool:
        """Return whether the text may be encoded between added tokens, and bytes say what is in the loss."""
        encoding = self._tokenizer.byte_level
        if encoding is None or not encoding.is_normal(text):
            return False
        # Offsets may leave out blanks, but one in front of the whole text, and those of added tokens.
        return encoding.leading is None or not (text[0] == " " or self._has_blank_tokens)

    def _encoded_whole(self, text: str, spans: Sequence[Span], forgets: bool) -> Document:
        """Return the document by the tokenizer's own ids, and its offsets."""
        ids, characters = self._tokenizer.encode_whole(text)
        if not ids:
            raise ConversationError("the tokenizer's chat template writes nothing for it")
        begins, ends = np.array(characters, np.int64).T
        mask = np.zeros(len(ids), bool)
        for begin, end in spans:
            mask |= (ends > begin) & (begins < end)
        return Document(np.array(ids, np.uint32), mask, (), forgets)

    # What the template is given

    def _plain(self, index: int, message: Message) -> dict[str, Any]:
        rest = message.rest
        as_text = bool(rest and rest.get("tool_calls")) and self._writer.arguments_as_text
        for key, value in (rest or {}).items():
            if value is True and MESSAGE.get(key) == TEMPLATE and not re.search(rf"\b{key}\b", self._writer.sources):
                raise ConversationError(f"message {index}: the chat template does not read its {key}, True; remove it")
        found = plain(index, message, as_parts=self._writer.as_parts, arguments_as_text=as_text)
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
        source = self._writer.source(tools)
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
        if tools and not self._writer.writes_tools:
            raise ConversationError("the tokenizer's chat template does not write its tools; " + REMEDY)
        return tools, given

    # What is in the loss

    def _spans(
        self,
        conversation: Conversation,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        given: Mapping[str, Any],
        text: str,
        marked: list[Span] | None,
    ) -> tuple[list[Span], bool]:
        """Return the spans in the loss, and whether thoughts are left out; ConversationError as a call raises it."""
        outlined, leaves = outline(messages, self._marker)

        def written(count: int, *, prompt: bool = False) -> str | None:
            return self._writer.outline(outlined[:count], tools, given, prompt=prompt)

        whole = written(len(outlined))
        places = None if whole is None else locate(text, whole, leaves)
        found = set(range(len(leaves))) if whole is None else {leaf for leaf, _, _ in marks(whole)}
        if places is None:
            # The template looks into what it is given.
            found = {leaf for leaf in found if any(form in text for form in forms(leaves[leaf].value))}
        forgets = self._refuse_lost(messages, leaves, found, written)
        if marked is not None:
            return self._of_marks(conversation, text, marked, leaves, places), forgets
        if places is None:
            raise ConversationError(
                "the chat template looks into what it is given, so what is in the loss cannot be found in its text; "
                + self._remedy()
            )
        spans = [
            self._answers.span(index, text, places, leaves, lambda i: written(i, prompt=True), lambda i: written(i + 1))
            for index, message in enumerate(conversation.messages)
            if message.role == "assistant" and message.train
        ]
        return spans, forgets

    def _refuse_lost(
        self, messages: Sequence[Mapping[str, Any]], leaves: Sequence[Leaf], found: set[int], written: Any
    ) -> bool:
        """Return whether thoughts of earlier turns are left out; raise for anything else that is."""
        forgets = False
        for number, leaf in enumerate(leaves):
            if number in found or leaf.value == "":
                continue
            if leaf.thought and leaf.message + 1 < len(messages):
                until = written(leaf.message + 1) or ""
                if any(number == mark for mark, _, _ in marks(until)):
                    forgets = True
                    continue
            raise ConversationError(
                f"message {leaf.message}: the chat template writes nothing of its {leaf.key}: {short(leaf.value)} is "
                f"lost; {self._remedy()}"
            )
        return forgets

    def _of_marks(
        self,
        conversation: Conversation,
        text: str,
        marked: list[Span],
        leaves: Sequence[Leaf],
        places: Sequence[Place] | None,
    ) -> list[Span]:
        spans = _join(marked)
        if not all(message.train for message in conversation.messages):
            if places is None:
                raise ConversationError(
                    "which message each {% generation %} belongs to cannot be found, and one of them is not to be in "
                    f"the loss; {self._remedy()}"
                )
            spans = [span for span in spans if self._is_in_loss(conversation, span, leaves, places)]
        for span in spans:
            if self._answers.lacks_its_end(text, span):
                raise ConversationError(
                    f"{short(text[slice(*span)])} would be in the loss without the special token that ends it, so the "
                    "model would not stop; put that token inside {% generation %}"
                )
        return spans

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


def _join(spans: Sequence[Span]) -> list[Span]:
    """Join spans that follow each other directly."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin == joined[-1][1]:
            begin, _ = joined.pop()
        joined.append((begin, end))
    return joined


def _training_template(source: str) -> str:
    """Name the template for training that trl has in place of this one, if it is installed and has one."""
    found = importlib.util.find_spec("trl")
    for folder in found.submodule_search_locations or () if found else ():
        for path in Path(folder, "chat_templates").glob("*.jinja"):
            trains = path.with_name(f"{path.stem}_training.jinja").exists()
            if trains and path.read_text(encoding="utf-8").strip() == source.strip():
                return "; template='hf-training' is the one that trl trains by in its place"
    return ""


def _name(tokenizer: object) -> str:
    return str(getattr(tokenizer, "name", type(tokenizer).__name__))


def _check_templates(tokenizer: HuggingFaceTokenizer) -> None:
    """Raise ValueError where none of several templates is the default, TemplateError where one is not Jinja."""
    from jinja2 import TemplateSyntaxError

    named = tokenizer.chat.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has the chat templates {', '.join(map(repr, named))}, and none is called "
            "default; call one so, or set its chat_template to one of them"
        )
    compile_template = compiler()
    if compile_template is None:
        return
    for tools in (False, True):
        try:
            compile_template(tokenizer.chat_template(tools=tools))
        except TemplateSyntaxError as error:
            raise TemplateError(
                f"tokenizer {tokenizer.name!r}: its chat template is not Jinja in line {error.lineno} "
                f"({error.message}); correct it"
            ) from error
