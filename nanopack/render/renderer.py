"""Render a conversation as a document: its token ids, and a mask of the tokens that the loss counts.

    Conversation   ->   Renderer.plan()   ->   Plan   ->   Renderer.fill_in()   ->   Document
    records.py          one at a time                      many in one go            producer/reader.py cuts it

A template only says which special tokens and which texts follow each other. Every text is encoded on its own, so text
that looks like a special token stays text. Nothing is cut here: the sequence length does not come in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from nanopack.conversations.keys import MESSAGE, TEMPLATE
from nanopack.conversations.records import Conversation, Message, Tokens, choose
from nanopack.errors import ConversationError, TemplateError
from nanopack.render.document import Document, Plan, encode
from nanopack.render.hf_template import ChatTemplate
from nanopack.render.planners import NANOCHAT, Planner, known, nanochat_planner, template_planner
from nanopack.render.templates import CHATML, LLAMA3, Template
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.tokenizer import NANOCHAT_SPECIAL_TOKENS, AnyTokenizer


class Renderer:
    """Renders conversations, one at a time or many in one go."""

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        template: str | Template,
        loss: str = "assistant",
        first_assistant: str = "keep",
    ) -> None:
        """Render by `template`: a name or a `Template`. ValueError where there is no such template.

        `loss` and `first_assistant` are as in `Loader`; loss="all" masks as "assistant" does.
        """
        self._choice = loss, first_assistant
        self._plan_messages: Planner | None = None
        if template in ("hf", "hf-training"):
            self._encode_chat = ChatTemplate(tokenizer)
            self._tokenizer = _with_special(tokenizer, self._encode_chat.controls)
            self._bos = known(tokenizer.bos_id)
            return
        found = NANOCHAT if template == "nanochat" else _find(template)
        self._tokenizer = tokenizer = _with_special(tokenizer, _needed_tokens(template))
        self._bos = known(tokenizer.bos_id)
        if missing := missing_tokens(tokenizer, template):
            self._plan_messages = _refuse_messages(tokenizer, template, missing)
            return
        self._plan_messages = (
            nanochat_planner(tokenizer) if template == "nanochat" else template_planner(tokenizer, found)
        )
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._check_context(tokenizer, found)

    def _check_context(self, tokenizer: HuggingFaceTokenizer, template: Template) -> None:
        """Raise ValueError where the tokenizer writes a text otherwise when it is encoded apart from what is around it.

        A tokenizer such as Llama 2's puts a space in front of each. That a text merges with its neighbours is no
        matter: the same characters must come back.
        """
        said = {"user": "Hello there", "assistant": "It is five."}
        turns = [(role, getattr(template, role)) for role in (*said, *said)]
        whole = "".join(f"{turn.before}{said[role]}{turn.end}{turn.after}" for role, turn in turns)
        assert self._plan_messages is not None
        ids = self.fill_in([self._plan_messages([Message(role, said[role]) for role, _ in turns])])[0].ids[1:]
        expected, _ = tokenizer.encode_whole(whole)
        if ids.tolist() == expected or (got := tokenizer.decode(ids)) == (own := tokenizer.decode(expected)):
            return
        raise ValueError(
            f"tokenizer {tokenizer.name!r} puts white space in front of a text that is encoded apart: "
            f"template={template.name!r} would write {got[:40]!r}… where the tokenizer itself has {own[:40]!r}…; use "
            "template='hf' with a chat_template that writes the same, or a tokenizer with add_prefix_space=False"
        )

    def __call__(self, conversation: Conversation) -> Document:
        """Return the document of a conversation.

        Raises ConversationError for what the template forbids or the tokenizer cannot encode, naming the message, and
        for any messages TemplateError where the tokenizer lacks special tokens of it: plain text needs none of them.
        """
        return self.fill_in_one(self.plan(conversation), conversation)

    def fill_in_one(self, plan: Plan | Document, conversation: Conversation) -> Document:
        """Return the document of a plan; ConversationError where the tokenizer refuses a text, naming the message."""
        try:
            return self.fill_in([plan])[0]
        except ValueError as error:
            raise ConversationError(_blame(self._tokenizer, conversation.messages, error)) from error

    def plan(self, conversation: Conversation) -> Plan | Document:
        """Return the plan that `fill_in` makes a document: all but the slow encoding. Raises as a call does."""
        plan = self._plan(choose(conversation, *self._choice))
        # a weight of 0 means the same with and without loss_weights
        return plan if conversation.weight else _out_of_loss(plan)

    def _plan(self, conversation: Conversation) -> Plan | Document:
        if conversation.tokens is not None:
            return _take_over(conversation.tokens, self._tokenizer)
        if conversation.text is not None:
            return Plan([self._bos, conversation.text], [True, True], [])
        if self._plan_messages is None:
            # Where in it each message begins the tokenizer's own template does not tell.
            return self._encode_chat(conversation)
        if not conversation.messages:
            raise ConversationError("there are no messages; a conversation needs at least one")
        _refuse_unwritten(conversation)
        return self._plan_messages(conversation.messages)

    def fill_in(self, plans: Sequence[Plan | Document]) -> list[Document]:
        """Return the document of each plan, as views of arrays that they share; documents stay as they are.

        ValueError where the tokenizer refuses a text. It does not say which.
        """
        filled = encode(self._tokenizer, [plan for plan in plans if isinstance(plan, Plan)])
        return [plan if isinstance(plan, Document) else next(filled) for plan in plans]


def _out_of_loss(plan: Plan | Document) -> Plan | Document:
    if isinstance(plan, Plan):
        expected = plan.expected and replace(plan.expected, mask=np.zeros_like(plan.expected.mask))
        return plan._replace(in_loss=[False] * len(plan.in_loss), spans=(), expected=expected)
    return replace(plan, mask=np.zeros_like(plan.mask))


def _take_over(tokens: Tokens, tokenizer: AnyTokenizer) -> Document:
    """Return the document that was rendered elsewhere; ConversationError where the tokenizer lacks its ids."""
    ids, mask = tokens
    kind = ids.dtype
    # as an unsigned number of the same size, one below 0 is beyond all others
    unsigned = ids.view(kind.str.replace("i", "u"))
    if int(np.maximum.reduce(unsigned)) >= min(tokenizer.vocab_size, 1 << (8 * kind.itemsize - (kind.kind == "i"))):
        wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
        raise ConversationError(
            f"input_ids has {wrong}; tokenizer {tokenizer.name!r} has ids from 0 to {tokenizer.vocab_size - 1}"
        )
    # a data set may use its arrays again for the next conversation, which is read before this one is written
    return Document(ids.copy(), np.ones(len(ids), bool) if mask is None else mask.copy(), ())


def _refuse_unwritten(conversation: Conversation) -> None:
    """Raise ConversationError for what only a tokenizer's own chat template can write."""
    only = "which only template='hf' writes"
    for name, value in (("tools", conversation.tools), ("chat_template_kwargs", conversation.template_kwargs)):
        if value is not None:
            raise ConversationError(f"the record has {name}, {only}; use it, or remove them")
    for index, message in enumerate(conversation.messages):
        for key in message.rest or ():
            if MESSAGE.get(key) == TEMPLATE:
                what = "them into the content" if key == "tool_calls" else "it into the content, or remove it"
                raise ConversationError(f"message {index}: it has {key}, {only}; write {what}")


def _find(template: str | Template) -> Template:
    if isinstance(template, Template):
        return template
    if not isinstance(template, str) or template not in _NAMED:
        names = ", ".join(map(repr, ("nanochat", *_NAMED, "hf", "hf-training")))
        raise ValueError(f"template={template!r} is not one of {names}, or a nanopack.Template.")
    return _NAMED[template]


def missing_tokens(tokenizer: AnyTokenizer, template: str | Template) -> list[str]:
    """Return the special tokens that messages need in this template, and that the tokenizer lacks."""
    present = tokenizer.added_tokens if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer.special_tokens
    return [token for token in _needed_tokens(template) if token not in present]


def _needed_tokens(template: str | Template) -> Sequence[str]:
    if template in ("hf", "hf-training"):
        return ()
    return NANOCHAT_SPECIAL_TOKENS[1:] if template == "nanochat" else _find(template).special_tokens


def _with_special(tokenizer: AnyTokenizer, tokens: Iterable[str]) -> AnyTokenizer:
    """Return a tokenizer to which these tokens are special, so that messages cannot hold them."""
    return tokenizer.with_special(tokens) if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer


def _refuse_messages(tokenizer: AnyTokenizer, template: str | Template, missing: list[str]) -> Planner:
    name = template if isinstance(template, str) else template.name

    def refuse(messages: Sequence[Message]) -> Plan:
        raise TemplateError(
            f"tokenizer {tokenizer.name!r} lacks special tokens of template={name!r}: {', '.join(missing)}. "
            f"Give a tokenizer that has them, another template, or plain text instead of messages."
        )

    return refuse


def _blame(tokenizer: AnyTokenizer, messages: Sequence[Message], error: ValueError) -> str:
    """Say which message holds the text that cannot be encoded. Slow, so only after the fact."""
    for index, message in enumerate(messages):
        content = message.content
        try:
            tokenizer.encode_batch([content] if isinstance(content, str) else [part.text for part in content])
        except ValueError as its_error:
            return f"message {index}: {its_error}"
    # Plain text, or a system and a user message that fail only together.
    return str(error)


# The templates that have a name, except nanochat's.
_NAMED = {template.name: template for template in (CHATML, LLAMA3)}
