"""Render a conversation as a document: its token ids, and a mask of the tokens that the loss counts.

    Conversation       ->   make_renderer(tokenizer, template)   ->   Document
    conversations.py                                                  packing.py places it, ring.py writes it

A template only says which special tokens and which texts follow each other. Every text is encoded on its own,
all those of a conversation in one call, so text that looks like a special token stays text. Nothing is cut
here: the sequence length does not come in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

import numpy as np

from nanopack.conversations import Conversation, ConversationError, Message, Part, Tokens
from nanopack.tokenizers import NANOCHAT_SPECIAL_TOKENS, Tokenizer


@dataclass(frozen=True, eq=False)
class Document:
    """A rendered conversation. Its first token is the beginning of sequence."""

    ids: np.ndarray
    """(n,) uint32, or of other integers where it was rendered elsewhere: token ids."""
    mask: np.ndarray
    """(n,) bool: True where the token is trained."""
    starts: tuple[int, ...]
    """Index of the token that each message begins with, one per message; none for plain text. A system
    message that was merged begins where the user's does."""


class TemplateError(ValueError):
    """The tokenizer lacks special tokens of the template: no fault of a conversation, so none is skipped for it."""


# A text to encode, or ids that are known already; and whether these tokens are trained.
_Run: TypeAlias = tuple[str | np.ndarray, bool]
# A document before encoding: its runs in order, and for each message the index of the run it begins with.
_Plan: TypeAlias = tuple[list[_Run], list[int]]
_Planner: TypeAlias = Callable[[Sequence[Message]], _Plan]


def make_renderer(tokenizer: Tokenizer, template: str) -> Callable[[Conversation], Document]:
    """Return the function that renders a conversation by `template`: "nanochat" or "chatml".

    ValueError where there is no such template. The function itself raises `ConversationError` for what the template
    forbids, naming the message, and for any messages `TemplateError` where the tokenizer lacks special tokens of it:
    plain text needs none of them.
    """
    if not isinstance(template, str) or template not in _TEMPLATES:
        raise ValueError(f"template={template!r} is not one of {', '.join(map(repr, _TEMPLATES))}.")
    make_planner, _ = _TEMPLATES[template]
    missing = missing_tokens(tokenizer, template)
    plan_messages = _refuse_messages(tokenizer, template, missing) if missing else make_planner(tokenizer)
    bos = _known(tokenizer.bos_id)

    def render(conversation: Conversation) -> Document:
        if conversation.tokens is not None:
            return _take_over(conversation.tokens, tokenizer)
        if conversation.text is not None:
            plan: _Plan = [(bos, True), (conversation.text, True)], []
        elif conversation.messages:
            plan = plan_messages(conversation.messages)
        else:
            raise ConversationError("there are no messages; a conversation needs at least one")
        try:
            ids, offsets = tokenizer.encode_batch([run for run, _ in plan[0] if isinstance(run, str)])
        except ValueError as error:
            raise ConversationError(_blame(tokenizer, conversation.messages, error)) from error
        return _fill_in(plan, ids, offsets.tolist())

    return render


def _take_over(tokens: Tokens, tokenizer: Tokenizer) -> Document:
    """Return the document that was rendered elsewhere; ConversationError where the tokenizer lacks its ids."""
    ids, mask = tokens
    if ids.max() >= tokenizer.vocab_size or (ids.dtype.kind == "i" and ids.min() < 0):
        wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
        raise ConversationError(
            f"input_ids has {wrong}; tokenizer {tokenizer.name!r} has ids from 0 to {tokenizer.vocab_size - 1}"
        )
    return Document(ids, np.ones(len(ids), bool) if mask is None else mask, ())


def missing_tokens(tokenizer: Tokenizer, template: str) -> list[str]:
    """Return the special tokens that messages need in this template, and that the tokenizer lacks."""
    return [token for token in _TEMPLATES[template][1] if token not in tokenizer.encoding.special_tokens_set]


def _refuse_messages(tokenizer: Tokenizer, template: str, missing: list[str]) -> _Planner:
    def refuse(messages: Sequence[Message]) -> _Plan:
        raise TemplateError(
            f"tokenizer {tokenizer.name!r} lacks special tokens of template={template!r}: {', '.join(missing)}. "
            f"Give a tokenizer that has them, another template, or plain text instead of messages."
        )

    return refuse


def _known(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.uint32)


def _fill_in(plan: _Plan, ids: np.ndarray, offsets: list[int]) -> Document:
    runs, firsts = plan
    texts = iter([ids[begin:end] for begin, end in pairwise(offsets)])
    arrays = [next(texts) if isinstance(run, str) else run for run, _ in runs]
    lengths = [len(array) for array in arrays]
    mask = np.array([trained for _, trained in runs]).repeat(lengths)
    begins = list(accumulate(lengths, initial=0))
    return Document(np.concatenate(arrays), mask, tuple([begins[first] for first in firsts]))


def _blame(tokenizer: Tokenizer, messages: Sequence[Message], error: ValueError) -> str:
    """Say which message holds the text that cannot be encoded. Slow, so only after the fact."""
    for index, message in enumerate(messages):
        content = message.content
        try:
            tokenizer.encode_batch([content] if isinstance(content, str) else [part.text for part in content])
        except ValueError as its_error:
            return f"message {index}: {its_error}"
    # Plain text, or a system and a user message that fail only together.
    return str(error)


def _nanochat(tokenizer: Tokenizer) -> _Planner:
    """Plan messages as karpathy/nanochat does: `render_conversation` in its nanochat/tokenizer.py."""
    known = {token: _known(tokenizer.special_id(token)) for token in NANOCHAT_SPECIAL_TOKENS[1:]}
    bos = (_known(tokenizer.bos_id), False)
    user_start, user_end = (known["<|user_start|>"], False), (known["<|user_end|>"], False)
    assistant_start, assistant_end = (known["<|assistant_start|>"], False), (known["<|assistant_end|>"], True)
    # The model writes the code; what comes out of it is given to the model.
    code_start, code_end = (known["<|python_start|>"], True), (known["<|python_end|>"], True)
    output_start, output_end = (known["<|output_start|>"], False), (known["<|output_end|>"], False)

    def plan_part(index: int, number: int, part: Part) -> list[_Run]:
        if part.type == "text":
            return [(part.text, True)]
        if part.type == "python":
            return [code_start, (part.text, True), code_end]
        if part.type == "python_output":
            return [output_start, (part.text, False), output_end]
        what = f"message {index}: part {number} has type {part.type!r}"
        raise ConversationError(f"{what}; it must be text, python or python_output")

    def plan_messages(messages: Sequence[Message]) -> _Plan:
        turns = _merge_system(messages)
        merged = len(messages) - len(turns)
        runs: list[_Run] = [bos]
        # A merged system message begins where the user's does: with the first run behind bos.
        firsts = [1] * merged
        for index, turn in enumerate(turns, merged):
            firsts.append(len(runs))
            expected = "assistant" if (index - merged) % 2 else "user"
            if turn.role != expected:
                raise ConversationError(_wrong_role(messages, index))
            if expected == "user":
                runs += (user_start, (_string(index, turn), False), user_end)
            elif isinstance(turn.content, str):
                runs += (assistant_start, (turn.content, True), assistant_end)
            else:
                runs.append(assistant_start)
                for number, part in enumerate(turn.content):
                    runs += plan_part(index, number, part)
                runs.append(assistant_end)
        return runs, firsts

    return plan_messages


def _merge_system(messages: Sequence[Message]) -> Sequence[Message]:
    """Put a first system message in front of the user's text, as nanochat does."""
    if messages[0].role != "system":
        return messages
    system = _string(0, messages[0])
    if len(messages) == 1:
        raise ConversationError("message 0: role is 'system' and no message follows; a user's must")
    if messages[1].role != "user":
        raise ConversationError(_wrong_role(messages, 1))
    return (Message("user", f"{system}\n\n{_string(1, messages[1])}"), *messages[2:])


def _wrong_role(messages: Sequence[Message], index: int) -> str:
    role = messages[index].role
    what = f"message {index}: role is {role!r}"
    if role not in _ROLES:
        return f"{what}; it must be system, user or assistant"
    if role == "system":
        return f"{what}; only message 0 may be a system message"
    order = "messages must alternate user/assistant after an optional system message"
    if index > 0 and messages[index - 1].role == role:
        return f"{what} twice in a row; {order}"
    return f"{what} where the first user message must be; {order}"


def _string(index: int, message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    what = f"message {index}: content is a list of parts"
    raise ConversationError(f"{what}; for role {message.role!r} it must be a string")


def _chatml(tokenizer: Tokenizer) -> _Planner:
    """Plan messages as ChatML: `<|im_start|>`, role, newline, content, `<|im_end|>`, newline."""
    bos = (_known(tokenizer.bos_id), False)
    start, end = (_known(tokenizer.special_id(token)) for token in ("<|im_start|>", "<|im_end|>"))
    newline = (tokenizer.encode("\n"), False)
    headers = {role: (np.concatenate([start, tokenizer.encode(f"{role}\n")]), False) for role in _ROLES}

    def plan_messages(messages: Sequence[Message]) -> _Plan:
        runs: list[_Run] = [bos]
        firsts = []
        for index, message in enumerate(messages):
            role = message.role
            if role not in headers:
                raise ConversationError(_wrong_role(messages, index))
            firsts.append(len(runs))
            trained = role == "assistant"
            runs += (headers[role], (_string(index, message), trained), (end, trained), newline)
        return runs, firsts

    return plan_messages


_ROLES = ("system", "user", "assistant")
# Each template's planner, and the special tokens it needs beside the beginning of sequence.
_TEMPLATES: dict[str, tuple[Callable[[Tokenizer], _Planner], tuple[str, ...]]] = {
    "nanochat": (_nanochat, NANOCHAT_SPECIAL_TOKENS[1:]),
    "chatml": (_chatml, ("<|im_start|>", "<|im_end|>")),
}
