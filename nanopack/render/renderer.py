"""Render a conversation as a document: its token ids, and a mask of the tokens that the loss counts.

    Conversation   ->   Renderer.plan()   ->   Plan   ->   Renderer.fill_in()   ->   Document
    records.py          one at a time                      many in one go            producer/reader.py cuts it

A template only says which special tokens and which texts follow each other. Every text is encoded on its own, so text
that looks like a special token stays text. Nothing is cut here: the sequence length does not come in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from nanopack.conversations.keys import MESSAGE, TEMPLATE
from nanopack.conversations.messages import SYSTEM_ROLES
from nanopack.conversations.records import Conversation, Message, Part, Tokens, choose
from nanopack.errors import ConversationError, TemplateError
from nanopack.render.document import Document, Plan, encode
from nanopack.render.hf_template import ChatTemplate
from nanopack.render.templates import CHATML, LLAMA3, Template, Turn
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.tokenizer import NANOCHAT_SPECIAL_TOKENS, AnyTokenizer

_Planner: TypeAlias = Callable[[Sequence[Message]], Plan]


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
        self._plan_messages: _Planner | None = None
        if template in ("hf", "hf-training"):
            self._encode_chat = ChatTemplate(tokenizer)
            self._tokenizer = _with_special(tokenizer, self._encode_chat.controls)
            self._bos = _known(tokenizer.bos_id)
            return
        known = template if template == "nanochat" else _find(template)
        self._tokenizer = tokenizer = _with_special(tokenizer, _needed_tokens(template))
        self._bos = _known(tokenizer.bos_id)
        if missing := missing_tokens(tokenizer, template):
            self._plan_messages = _refuse_messages(tokenizer, template, missing)
            return
        self._plan_messages = _nanochat(tokenizer) if isinstance(known, str) else _templated(tokenizer, known)
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._check_context(tokenizer, _NANOCHAT if isinstance(known, str) else known)

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
        plan = self.plan(conversation)
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
    if ids.max() >= tokenizer.vocab_size or (ids.dtype.kind == "i" and ids.min() < 0):
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
    known = tokenizer.added_tokens if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer.special_tokens
    return [token for token in _needed_tokens(template) if token not in known]


def _needed_tokens(template: str | Template) -> Sequence[str]:
    if template in ("hf", "hf-training"):
        return ()
    return NANOCHAT_SPECIAL_TOKENS[1:] if template == "nanochat" else _find(template).special_tokens


def _with_special(tokenizer: AnyTokenizer, tokens: Iterable[str]) -> AnyTokenizer:
    """Return a tokenizer to which these tokens are special, so that messages cannot hold them."""
    return tokenizer.with_special(tokens) if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer


def _refuse_messages(tokenizer: AnyTokenizer, template: str | Template, missing: list[str]) -> _Planner:
    name = template if isinstance(template, str) else template.name

    def refuse(messages: Sequence[Message]) -> Plan:
        raise TemplateError(
            f"tokenizer {tokenizer.name!r} lacks special tokens of template={name!r}: {', '.join(missing)}. "
            f"Give a tokenizer that has them, another template, or plain text instead of messages."
        )

    return refuse


def _known(*ids: int) -> bytes:
    return np.array(ids, np.uint32).tobytes()


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


def _nanochat(tokenizer: AnyTokenizer) -> _Planner:
    """Plan messages as karpathy/nanochat does: `render_conversation` in its nanochat/tokenizer.py."""
    user_start, user_end, assistant_start, assistant_end, code_start, code_end, output_start, output_end = (
        _known(tokenizer.special_id(f"<|{name}_{end}|>"))
        for name in ("user", "assistant", "python", "output")
        for end in ("start", "end")
    )
    bos = _known(tokenizer.bos_id)

    def plan_part(index: int, number: int, part: Part) -> tuple[list[str | bytes], list[bool]]:
        if part.type == "text":
            return [part.text], [True]
        # The model writes the code; what comes out of it is given to the model.
        if part.type == "python":
            return [code_start, part.text, code_end], [True, True, True]
        if part.type == "python_output":
            return [output_start, part.text, output_end], [False, False, False]
        what = f"message {index}: part {number} has type {part.type!r}"
        raise ConversationError(f"{what}; it must be text, python or python_output")

    def plan_messages(messages: Sequence[Message]) -> Plan:
        turns = _merge_system(messages)
        merged = len(messages) - len(turns)
        runs: list[str | bytes] = [bos]
        trained = [False]
        # A merged system message begins where the user's does: with the first run after bos.
        firsts = [1] * merged
        for index, turn in enumerate(turns, merged):
            firsts.append(len(runs))
            expected = "assistant" if (index - merged) % 2 else "user"
            if turn.role != expected:
                raise ConversationError(_wrong_role(messages, index))
            if expected == "user":
                runs += (user_start, _string(index, turn), user_end)
                trained += (False, False, False)
            elif isinstance(turn.content, str):
                runs += (assistant_start, turn.content, assistant_end)
                trained += (False, turn.train, turn.train)
            else:
                runs.append(assistant_start)
                trained.append(False)
                for number, part in enumerate(turn.content):
                    part_runs, part_trained = plan_part(index, number, part)
                    runs += part_runs
                    trained += [in_loss and turn.train for in_loss in part_trained]
                runs.append(assistant_end)
                trained.append(turn.train)
        return Plan(runs, trained, firsts)

    return plan_messages


def _merge_system(messages: Sequence[Message], before: str = "", after: str = "\n\n") -> Sequence[Message]:
    """Put a first system message in front of the user's text, as nanochat does."""
    if messages[0].role not in SYSTEM_ROLES:
        return messages
    system = _string(0, messages[0])
    if len(messages) == 1:
        raise ConversationError(f"message 0: role is {messages[0].role!r} and no message follows; a user's must")
    if messages[1].role != "user":
        raise ConversationError(_wrong_role(messages, 1))
    both = f"{before}{system}{after}{_string(1, messages[1])}"
    return (Message("user", both, train=messages[1].train), *messages[2:])


def _wrong_role(messages: Sequence[Message], index: int) -> str:
    role = messages[index].role
    what = f"message {index}: role is {role!r}"
    if role == "tool":
        return f"{what}; template='nanochat' has none: what a tool gave back is a python_output part of the assistant's"
    if role in SYSTEM_ROLES:
        return f"{what}; only message 0 may be a system message"
    order = "messages must alternate user/assistant after an optional system message"
    if index > 0 and messages[index - 1].role == role:
        return f"{what} twice in a row; {order}"
    begins = "; first_assistant='drop' or 'empty_user' helps" if role == "assistant" else ""
    return f"{what} where the first user message must be; {order}{begins}"


def _string(index: int, message: Message) -> str:
    if (text := message.text) is None:
        what = f"message {index}: content has parts that are not text"
        raise ConversationError(f"{what}; for role {message.role!r} it must be a string or text parts")
    return text


def _templated(tokenizer: AnyTokenizer, template: Template) -> _Planner:
    """Plan messages as a `Template` says."""
    # Longest first: one special token may begin like another.
    tokens = sorted(template.special_tokens, key=len, reverse=True)
    special = re.compile(f"({'|'.join(map(re.escape, tokens))})" if tokens else r"(?!)")
    unlisted = set(tokenizer.special_tokens)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        # Blanks and the brackets of a thought are added tokens that a model's own text may hold.
        unlisted |= {t for t in tokenizer.added_tokens if t.strip() and "think" not in t.lower()}

    def known_ids(text: str) -> bytes:
        pieces = [piece for piece in special.split(text) if piece]
        for piece in pieces:
            for token in () if piece in tokens else unlisted:
                if token in piece:
                    raise ValueError(_unlisted(template, text, token))
        ids = [_known(tokenizer.special_id(p)) if p in tokens else tokenizer.encode(p).tobytes() for p in pieces]
        return b"".join(ids)

    bos = _known(tokenizer.bos_id)
    merged_system = template.system if template.merge_system else None

    def runs_around(turn: Turn) -> tuple[bytes, bytes, bytes, tuple[bool, ...]]:
        """The ids before and after the content, and which of the four parts are in the loss."""
        return (
            known_ids(turn.before),
            known_ids(turn.end),
            known_ids(turn.after),
            (False, turn.trained, turn.trained, False),
        )

    around = {role: runs_around(turn) for role, turn in template.turns().items() if turn is not merged_system}
    if "system" in around:
        around["developer"] = around["system"]

    def plan_messages(messages: Sequence[Message]) -> Plan:
        turns = messages
        if template.strip:
            turns = [m if m.text is None else replace(m, content=m.text.strip()) for m in turns]
        if merged_system:
            turns = _merge_system(turns, merged_system.before, merged_system.after)
        merged = len(messages) - len(turns)
        runs: list[str | bytes] = [bos]
        trained = [False]
        firsts = [1] * merged
        for index, message in enumerate(turns, merged):
            if message.role not in around:
                raise ConversationError(_no_such_role(template, index, message.role))
            firsts.append(len(runs))
            before, end, after, of_turn = around[message.role]
            runs += (before, _string(index, message), end, after)
            trained += of_turn if message.train else (False, False, False, False)
        return Plan(runs, trained, firsts)

    return plan_messages


def _unlisted(template: Template, text: str, token: str) -> str:
    return (
        f"template={template.name!r}: {text!r} holds {token!r}, a special token of the tokenizer that special_tokens "
        "does not list, so it would be encoded as text; list it"
    )


def _no_such_role(template: Template, index: int, role: str) -> str:
    what = f"message {index}: role is {role!r}"
    if role in SYSTEM_ROLES and template.merge_system:
        return f"{what}; only message 0 may be a system message"
    return f"{what}; template={template.name!r} has {', '.join(template.turns())}"


# How nanochat's turns look; how they may follow each other is more than this says.
_NANOCHAT = Template(
    name="nanochat",
    special_tokens=tuple(NANOCHAT_SPECIAL_TOKENS[1:5]),
    user=Turn(before="<|user_start|>", after="<|user_end|>"),
    assistant=Turn(before="<|assistant_start|>", end="<|assistant_end|>", trained=True),
)
# The templates that have a name, except nanochat's.
_NAMED = {template.name: template for template in (CHATML, LLAMA3)}
