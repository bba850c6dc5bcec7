"""The slow packer's tokens that are ready: `input_ids`, and the masks that say which are in the loss.

A part of the definition. It shares nothing with the fast path but the name of an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from nanopack.errors import ConversationError

Tokens = list[tuple[int, bool]]
MASKS = ["loss_mask", "assistant_masks", "assistant_mask", "completion_mask", "response_mask"]
OF_TOKENS = [*MASKS, "labels", "attention_mask", "position_ids", "seq_lengths"]


def read_tokens(held: Mapping[str, Any]) -> Tokens:
    """The tokens of a record with `input_ids`, each as (id, in the loss)."""
    ids = _numbers(held["input_ids"], "input_ids")
    marks = {key: [_bit(key, bit) for bit in _numbers(held[key], key)] for key in MASKS if key in held}
    if "labels" in held:
        labels = _numbers(held["labels"], "labels")
        if len(labels) != len(ids) or any(label not in (-100, id) for label, id in zip(labels, ids, strict=True)):
            raise ConversationError("its labels are neither -100 nor the input_ids at the same index")
        if any(isinstance(label, bool) or not isinstance(label, Integral) for label in labels):
            raise ConversationError("its labels are not ints")
        marks["labels"] = [label != -100 for label in labels]
    kept = [True] * len(ids)
    if "attention_mask" in held:
        kept = [_bit("attention_mask", bit) for bit in _numbers(held["attention_mask"], "attention_mask")]
    if any(len(mark) != len(ids) for mark in [kept, *marks.values()]):
        raise ConversationError(f"it has {len(ids)} input_ids and a mask of another length")
    tokens = []
    for index, id in enumerate(ids):
        said = {mark[index] for mark in marks.values()} or {True}
        if isinstance(id, bool) or not isinstance(id, Integral):
            raise ConversationError(f"input_ids has {id!r}")
        if kept[index] and len(said) > 1:
            raise ConversationError(f"its masks contradict each other at token {index}")
        if kept[index]:
            tokens.append((int(id), said.pop()))
    if not tokens:
        raise ConversationError("it has no tokens")
    _one_document(held, kept)
    return tokens


def _one_document(held: Mapping[str, Any], kept: list[bool]) -> None:
    """Refuse a record into which several documents were packed."""
    positions = _numbers(held.get("position_ids", list(range(len(kept)))), "position_ids")
    if len(positions) != len(kept):
        raise ConversationError("it has more or fewer position_ids than input_ids")
    if any(not isinstance(position, Integral) or isinstance(position, bool) for position in positions):
        raise ConversationError("its position_ids are not ints")
    positions = [position for position, keep in zip(positions, kept, strict=True) if keep and "position_ids" in held]
    if any(positions[i + 1] - positions[i] != 1 for i in range(len(positions) - 1)):
        raise ConversationError("its position_ids do not count up by 1")
    for key, most in (("seq_lengths", 1), ("seq_start_id", 1), ("cu_seqlens", 2)):
        if len(_numbers(held.get(key, []), key)) > most:
            raise ConversationError(f"its {key} shows several documents")
    for key in ("segment_ids", "sequence_ids", "seq_idx", "doc_ids", "document_ids"):
        segments = _numbers(held.get(key, [0] * len(kept)), key)
        if len(segments) != len(kept) or len({one for one, keep in zip(segments, kept, strict=True) if keep}) > 1:
            raise ConversationError(f"its {key} shows several documents")


def _numbers(values: Any, name: str) -> list[Any]:
    # of whatever array or tensor they come in
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)):
        raise ConversationError(f"its {name} must be a list")
    if len({isinstance(value, bool) for value in values}) > 1:
        raise ConversationError(f"its {name} mixes bools with numbers")
    return list(values)


def _bit(name: str, bit: Any) -> bool:
    if isinstance(bit, float) or not isinstance(bit, Integral) or bit not in (0, 1):
        raise ConversationError(f"its {name} has {bit!r}; it must be 0 or 1")
    return bool(bit)
