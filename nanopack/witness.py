"""Ask other libraries what is in the loss: a second witness, for the reference shares our reading of records.

    records, tokenizer   ->   witness()   ->   (id, in the loss) of each record   ->   compare()   ->   Testimony
                                                                    and our own

"trl" is what TRL's SFTTrainer makes of a record with assistant_only_loss, with the chat template that TRL trains by;
"transformers" is apply_chat_template(return_assistant_tokens_mask=True) with the tokenizer's own; "axolotl-like" is a
labels column next to input_ids. Nothing of our renderer is used here.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

from nanopack.errors import ConversationError

WITNESSES = ("trl", "transformers", "axolotl-like")
SHAPES = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}

Tokens: TypeAlias = list[tuple[int, bool]]
"""(id, whether it is in the loss)."""


@dataclass(frozen=True)
class Testimony:
    """What a comparison with a witness found; true when tokens are in the loss, and the same in both."""

    against: str
    conversations: int
    """Conversations that were compared and equal."""
    tokens: int
    """Tokens in them."""
    num_loss_tokens: int
    """Those of them in the loss."""
    refused: int
    """Conversations that nanopack refuses, so that nothing of them is in a batch."""
    unread: int
    """Conversations of which the witness says nothing: it has another shape, or the witness raises."""
    difference: str | None
    """The first difference: conversation, token, who has it in the loss, and the text around it."""

    def __bool__(self) -> bool:
        return self.difference is None and self.num_loss_tokens > 0


def compare(
    records: Iterable[tuple[str, Any]],
    ours: Callable[[Any], Tokens],
    tokenizer: Any,
    against: str,
) -> Testimony:
    """Compare what is in the loss of each record, token by token, up to the first difference.

    `records` yields where each stands, and the record; `ours` gives its tokens or raises ConversationError. `tokenizer`
    is a transformers tokenizer; None will do for "axolotl-like".

    Raises ValueError for an unknown witness or a tokenizer that it cannot use, ImportError where it is not installed.
    """
    theirs = witness(against, tokenizer)
    counts = dict.fromkeys(("conversations", "tokens", "num_loss_tokens", "refused", "unread"), 0)
    for where, record in records:
        try:
            own = ours(record)
        except ConversationError:
            counts["refused"] += 1
            continue
        other = theirs(record)
        if other is None:
            counts["unread"] += 1
            continue
        if (difference := first_difference(own, other, tokenizer, against)) is not None:
            return Testimony(against, **counts, difference=f"{where}, {difference}")
        counts["conversations"] += 1
        counts["tokens"] += len(own)
        counts["num_loss_tokens"] += sum(in_loss for _, in_loss in own)
    return Testimony(against, **counts, difference=None)


def witness(against: str, tokenizer: Any) -> Callable[[Any], Tokens | None]:
    """Return the function that gives a record's tokens, None where the witness cannot read it; raises as `compare`."""
    if against == "axolotl-like":
        return _of_labels
    if against not in WITNESSES:
        raise ValueError(f"against={against!r} is not allowed; use one of {', '.join(map(repr, WITNESSES))}")
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ValueError(f"against={against!r} needs a transformers tokenizer with a chat template; give one")
    chat_template = tokenizer.get_chat_template()
    if against == "trl":
        if importlib.util.find_spec("trl") is None:
            raise ImportError("against='trl' asks TRL, which is not installed; pip install trl")
        from trl.chat_template_utils import get_training_chat_template

        chat_template = get_training_chat_template(tokenizer) or chat_template
    elif not re.search(r"\{%[-+]?\s*generation\b", chat_template):
        raise ValueError(
            "against='transformers' reads {% generation %} marks, and the tokenizer's chat template has none; set one "
            "that has, or use against='trl'"
        )
    return lambda record: _of_template(tokenizer, chat_template, record)


def _of_labels(record: Any) -> Tokens | None:
    if not isinstance(record, Mapping) or record.get("input_ids") is None or record.get("labels") is None:
        return None
    ids = [int(id) for id in record["input_ids"]]
    labels = [int(label) for label in record["labels"]]
    attended = record.get("attention_mask")
    kept = [True] * len(ids) if attended is None else [bool(bit) for bit in attended]
    return [(id, label != -100) for id, label, keep in zip(ids, labels, kept, strict=True) if keep]


def _of_template(tokenizer: Any, chat_template: str, record: Any) -> Tokens | None:
    """Return the tokens that apply_chat_template marks; of a prompt and completion, only those of the completion."""
    record = record if isinstance(record, Mapping) else {"messages": record}
    asks = record.get("prompt") is not None and record.get("completion") is not None
    prompt = _messages(record["prompt"]) if asks else []
    said = record["completion"] if asks else next((record[k] for k in SHAPES if record.get(k) is not None), None)
    messages = prompt + _messages(said)
    if not messages or (asks and not prompt):
        return None
    try:
        how = {
            "chat_template": chat_template,
            "tools": _parsed(record.get("tools")) or None,
            "return_dict": True,
            **(_parsed(record.get("chat_template_kwargs")) or {}),
        }
        whole = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **how)
        begin = 0
        if asks:
            asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **how)["input_ids"]
            pairs = zip_longest(asked, whole["input_ids"])
            begin = next((at for at, (a, b) in enumerate(pairs) if a != b), len(asked))
    # A template is a program of its own: what it raises can be anything. So is what stands in a record.
    except Exception:
        return None
    masks = enumerate(zip(whole["input_ids"], whole["assistant_masks"], strict=True))
    return [(id, bool(bit) and at >= begin) for at, (id, bit) in masks]


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value else value


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        return []
    found = []
    for message in value:
        renamed = {{"from": "role", "value": "content"}.get(key, key): item for key, item in message.items()}
        found.append({**renamed, "role": ROLES.get(renamed.get("role", ""), renamed.get("role"))})
    return found


def first_difference(own: Sequence[tuple[int, bool]], other: Tokens, tokenizer: Any, against: str) -> str | None:
    """Return the first token in which two readings differ, in words, None if they are equal."""
    for at, (a, b) in enumerate(zip_longest(own, other)):
        if a == b:
            continue
        before = _text(tokenizer, [id for id, _ in (own if a else other)[max(0, at - 12) : at]])
        if a is None or b is None:
            longer, shorter, token = ("nanopack", against, a) if b is None else (against, "nanopack", b)
            what = f"{longer} has {_text(tokenizer, [(token or (0,))[0]])}, {shorter} has nothing more"
        elif a[0] != b[0]:
            what = f"nanopack has {_text(tokenizer, [a[0]])}, {against} has {_text(tokenizer, [b[0]])}"
        else:
            has, lacks = ("nanopack", against) if a[1] else (against, "nanopack")
            what = f"{_text(tokenizer, [a[0]])} is in the loss of {has}, not of {lacks}"
        return f"token {at}: {what}; before it stands {before}"
    return None


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return repr(list(ids) if tokenizer is None else tokenizer.decode(ids))
