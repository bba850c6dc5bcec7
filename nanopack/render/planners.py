"""Plan messages: which special tokens and which texts follow each other, and which of them are in the loss.

    messages   ->   nanochat_planner(), template_planner()   ->   Plan, which renderer.py fills in

A planner is a function of a tokenizer: what does not depend on the messages is encoded once, when it is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from nanopack.conversations.messages import SYSTEM_ROLES
from nanopack.conversations.records import Message, Part
from nanopack.errors import ConversationError
from nanopack.render.document import Plan
from nanopack.render.templates import Template, Turn
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.tokenizer import NANOCHAT_SPECIAL_TOKENS, AnyTokenizer

Planner: TypeAlias = Callable[[Sequence[Message]], Plan]
"""Raises ConversationError for messages that the template forbids."""


def known(*ids: int) -> bytes:
    """Return ids as a run of a plan that needs no encoding, uint32."""
    return np.array(ids, np.uint32).tobytes()


def nanochat_planner(tokenizer: AnyTokenizer) -> Planner:
    """Plan messages as karpathy/nanochat does: `render_conversation` in its nanochat/tokenizer.py."""
    user_start, user_end, assistant_start, assistant_end, code_start, code_end, output_start, output_end = (
        known(tokenizer.special_id(f"<|{name}_{end}|>"))
        for name in ("user", "assistant", "python", "output")
        for end in ("start", "end")
    )
    bos = known(tokenizer.bos_id)

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


def template_planner(tokenizer: AnyTokenizer, template: Template) -> Planner:
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
        ids = [known(tokenizer.special_id(p)) if p in tokens else tokenizer.encode(p).tobytes() for p in pieces]
        return b"".join(ids)

    bos = known(tokenizer.bos_id)
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
NANOCHAT = Template(
    name="nanochat",
    special_tokens=tuple(NANOCHAT_SPECIAL_TOKENS[1:5]),
    user=Turn(before="<|user_start|>", after="<|user_end|>"),
    assistant=Turn(before="<|assistant_start|>", end="<|assistant_end|>", trained=True),
)
