"""Take a document that was tokenized elsewhere: input_ids and their masks.

record with input_ids   ->   ready_tokens()   ->   Tokens
                                                  records.py puts them into a Conversation
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nanopack.conversations.keys import HARMLESS, RECORD
from nanopack.errors import ConversationError, short

# Keys that say of each token whether it is in the loss; labels says it too.
LOSS_MASKS = ("loss_mask", "assistant_masks", "assistant_mask", "completion_mask", "response_mask")
NOT_IN_LOSS = -100
# Keys that show of which documents a record was packed: how many entries one document has, and which document each
# token is of.
BOUNDS = {"seq_lengths": 1, "seq_start_id": 1, "cu_seqlens": 2}
SEGMENTS = ("segment_ids", "sequence_ids", "seq_idx", "doc_ids", "document_ids")


class Tokens(NamedTuple):
    """A document that is rendered already."""

    ids: np.ndarray
    """(n,) of any integers; whether the tokenizer has them, the renderer checks."""
    mask: np.ndarray | None
    """(n,) bool: which are in the loss; None: all."""


def ready_tokens(record: Mapping[str, Any]) -> Tokens:
    """Return the tokens of a record's input_ids, (n,), and which are in the loss; ConversationError where it is wrong.

    labels[i] belongs to input_ids[i]: -100 where it is not in the loss, else the id itself. Tokens whose attention_mask
    is 0 are removed. Several masks must agree on what stays.
    """
    ids = _array(record["input_ids"], "input_ids")
    if not len(ids):
        raise ConversationError("input_ids is empty; a document has at least one token")
    if ids.dtype.kind not in "iu":
        raise ConversationError(f"input_ids must be ints, not {ids.dtype}")
    length = len(ids)
    keep = _bools(record, "attention_mask", length)
    masks = {key: _bools(record, key, len(ids)) for key in LOSS_MASKS} | {"labels": _of_labels(record, ids)}
    given: dict[str, Any] = {key: mask for key, mask in masks.items() if mask is not None}
    if keep is not None and not keep.all():
        ids, given = ids[keep], {key: mask[keep] for key, mask in given.items()}
        if not len(ids):
            raise ConversationError("attention_mask is 0 everywhere: no token is left; remove the record")
    _refuse_several_documents(record, np.ones(length, bool) if keep is None else keep)
    if not given:
        return Tokens(ids, None)
    first, agreed = next(iter(given.items()))
    for key, mask in given.items():
        if not np.array_equal(mask, agreed):
            where = int(np.flatnonzero(mask != agreed)[0])
            raise ConversationError(f"{first} and {key} contradict each other at token {where}; remove one of them")
    return Tokens(ids, agreed)


def plain_tokens(record: dict[Any, Any]) -> Tokens | None:
    """Return the tokens of a record of input_ids and one loss_mask or labels, the usual one, as `ready_tokens` does.

    They are arrays, or lists of ints. None: the record takes a closer look, whether it is right or wrong.
    """
    ids = _plain_array(record["input_ids"], int)
    if ids is None or ids.dtype.kind not in "iu" or not len(ids):
        return None
    if "loss_mask" in record:
        mask = _plain_array(record["loss_mask"], bool)
        return Tokens(ids, mask) if mask is not None and mask.dtype == bool and len(mask) == len(ids) else None
    labels = _plain_array(record.get("labels"), int)
    if labels is None or labels.dtype != ids.dtype or len(labels) != len(ids):
        return None
    mask = labels != NOT_IN_LOSS
    return None if ((labels != ids) & mask).any() else Tokens(ids, mask)


def _plain_array(values: object, kind: type) -> np.ndarray | None:
    if type(values) is list and set(map(type, values)) == {kind}:
        try:
            return np.array(values)
        except OverflowError:
            return None
    return values if type(values) is np.ndarray and values.ndim == 1 else None


def _bools(record: Mapping[str, Any], key: str, length: int) -> Any:
    """Return a mask as (n,) bool; None where the record has none."""
    if record.get(key) is None:
        return None
    mask = _array(record[key], key)
    if len(mask) != length:
        raise ConversationError(f"{key} has {len(mask)} entries for {length} input_ids; give one for each")
    if mask.dtype == bool:
        return mask
    if mask.dtype.kind not in "iu" or mask.min(initial=0) < 0 or mask.max(initial=0) > 1:
        raise ConversationError(f"{key} must be bools or 0 and 1, not {short(record[key])} of {mask.dtype}")
    return mask.astype(bool)


def _of_labels(record: Mapping[str, Any], ids: np.ndarray) -> Any:
    if record.get("labels") is None:
        return None
    labels = _array(record["labels"], "labels")
    if len(labels) != len(ids):
        raise ConversationError(f"labels has {len(labels)} entries for {len(ids)} input_ids; give one for each")
    if labels.dtype.kind not in "iu":
        raise ConversationError(f"labels must be ints, not {labels.dtype}")
    in_loss = labels != NOT_IN_LOSS
    wrong = np.flatnonzero(in_loss & (labels != ids))
    if len(wrong):
        i = int(wrong[0])
        raise ConversationError(
            f"labels[{i}] is {labels[i]}, neither input_ids[{i}], which is {ids[i]}, nor {NOT_IN_LOSS}; "
            "labels must not be shifted"
        )
    return in_loss


def _refuse_several_documents(record: Mapping[str, Any], keep: np.ndarray) -> None:
    """Raise ConversationError where position_ids, seq_lengths or the like say that several documents were packed."""
    if record.get("position_ids") is not None:
        positions = _array(record["position_ids"], "position_ids")
        if len(positions) != len(keep):
            raise ConversationError(
                f"position_ids has {len(positions)} entries for {len(keep)} input_ids; give one for each"
            )
        if positions.dtype.kind not in "iu" or (np.diff(positions[keep].astype(np.int64)) != 1).any():
            raise ConversationError("position_ids do not count up by 1: the record is packed; give each document alone")
    for key, most in BOUNDS.items():
        if record.get(key) is not None and len(_array(record[key], key)) > most:
            raise ConversationError(f"{key} shows several documents: the record is packed; give each document alone")
    for key in SEGMENTS:
        if record.get(key) is None:
            continue
        segments = _array(record[key], key)
        if len(segments) != len(keep) or len(set(segments[keep].tolist())) > 1:
            raise ConversationError(f"{key} shows several documents: the record is packed; give each document alone")


def _array(values: object, name: str) -> np.ndarray:
    if isinstance(values, np.ma.MaskedArray) and values.mask.any():
        raise ConversationError(
            f"{name} has masked entries: {short(values)}; give .compressed() or .filled(value) of it"
        )
    if isinstance(values, np.ndarray) and values.dtype == object:
        values = values.tolist()
    # numpy takes True among ints for 1
    kinds = set(map(type, values)) if isinstance(values, (list, tuple)) else ()
    if bool in kinds and len(kinds) > 1:
        raise ConversationError(f"{name} mixes bools with other values: {short(values)}; give numbers of one kind")
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError, TypeError) as error:
        raise ConversationError(f"{name} is no flat array or list of numbers ({error})") from None
    if array.ndim != 1:
        raise ConversationError(f"{name} must be flat, not of shape {array.shape}: {short(values)}")
    return array


# Words of two kinds in a name that says where in the tokens an answer is: prompt_length, answer_start_idx, source_ids.
_SIDES = {"prompt", "source", "context", "instruction", "question", "query", "input", "user", "prefix"}
_SIDES |= {"answer", "completion", "response", "target", "assistant", "output", "reply"}
_EXTENTS = {"len", "lens", "length", "lengths", "start", "starts", "begin", "end", "idx", "index", "offset", "offsets"}
_EXTENTS |= {"ids", "tokens", "token", "span", "spans", "pos", "position", "positions", "boundary", "boundaries"}


def may_divide(key: str) -> bool:
    """Return whether a key of a record with input_ids may say where in them an answer is, by its name."""
    words = {word.lower() for word in re.findall(r"[A-Z]*[a-z]+|[A-Z]+", key)}
    return bool(words & {"span", "spans"} or (words & _SIDES and words & _EXTENTS))


def refuse_unread(record: Mapping[str, Any], unread: Mapping[str, Any]) -> None:
    """Raise ConversationError for a key next to input_ids that nothing reads, and that may say what is in the loss.

    It has a number for each token, or says where an answer begins and no mask says it.
    """
    length = len(record["input_ids"])
    masked = any(record.get(key) is not None for key in (*LOSS_MASKS, "labels"))
    for key, value in unread.items():
        if RECORD.get(key) == HARMLESS:
            continue
        numbers = _as_numbers(value)
        if numbers is not None and numbers.shape == (length,) and length > 1:
            raise ConversationError(
                f"{key} has a number for each of the input_ids, and nothing reads it: {short(value)}; name it "
                "loss_mask or labels if it says what is in the loss, or remove it"
            )
        if numbers is not None and _divides(numbers, length):
            raise ConversationError(f"{key} shows several documents: the record is packed; give each document alone")
        where = numbers is not None and numbers.size > 0 and not (numbers.ndim == 0 and int(numbers) == length)
        if where and not masked and may_divide(str(key)):
            raise ConversationError(
                f"{key} may say which of the input_ids are in the loss: {short(value)}; give a loss_mask or labels, "
                "or remove it"
            )


def _divides(numbers: np.ndarray, length: int) -> bool:
    """Return whether these are the lengths of several documents, or where they begin and the last one ends."""
    if numbers.ndim != 1 or len(numbers) < 2 or numbers.dtype.kind not in "iu":
        return False
    lengths = np.diff(numbers) if numbers[0] == 0 else numbers
    return len(lengths) > 1 and int(lengths.min()) > 0 and int(lengths.sum()) == length


def _as_numbers(value: Any) -> np.ndarray | None:
    """Return an integer, or a list of numbers of any depth, as an array; None for anything else."""
    if isinstance(value, (str, bytes, Mapping)) or value is None:
        return None
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        return None
    return array if array.dtype.kind in "iu" or (array.ndim and array.dtype.kind in "bf") else None
