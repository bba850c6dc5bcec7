"""The slow packer's tokens that are ready: `input_ids`, and the masks that say which are in the loss.

A part of the definition. It shares nothing with the fast path but the name of an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from nanopack.errors import ConversationError
from nanopack.reference.values import scalar, words_of

Tokens = list[tuple[int, bool]]
MASKS = ["loss_mask", "assistant_masks", "assistant_mask", "completion_mask", "response_mask"]
OF_TOKENS = [*MASKS, "labels", "attention_mask", "position_ids", "seq_lengths"]
# They say nothing that belongs into a batch, whatever they hold.
NOTES = {"id", "idx", "index", "uuid", "uid", "hash", "key", "source", "sources", "origin", "dataset", "dataset_name"}
NOTES |= {"subset", "split", "category", "categories", "topic", "topics", "domain", "language", "lang", "locale"}
NOTES |= {"tags", "title", "url", "link", "license", "license_name", "score", "scores", "quality", "rating", "model"}
NOTES |= {"model_name", "model_id", "created", "created_at", "updated_at", "timestamp", "timestamps", "time", "date"}
NOTES |= {"version", "revision", "comment", "comments", "metadata", "meta", "info", "user_id", "conversation_id"}
NOTES |= {"conversation_hash", "thread_id", "chat_id", "session_id", "prompt_id", "message_id", "parent_id"}
NOTES |= {"parent_message_id", "position", "usage", "finish_reason", "stop_reason", "logprobs", "object", "views"}
NOTES |= {"avatarUrl", "avatar", "skip_prompt_formatting", "annotations", "num_tokens", "token_count"}
NOTES |= {"__index_level_0__", "__key__", "__url__", "num_turns", "turns", "length", "token_type_ids"}
NOTES |= {"special_tokens_mask", "overflow_to_sample_mapping", "parallel_tool_calls"}
READ = [*OF_TOKENS, "input_ids", "weight", "cu_seqlens", "seq_start_id", "segment_ids", "sequence_ids", "seq_idx"]
READ += ["doc_ids", "document_ids"]
# A word of each in a key: where in the tokens the prompt or the answer is.
SIDES = {"prompt", "source", "context", "instruction", "question", "query", "input", "user", "prefix", "answer"}
SIDES |= {"completion", "response", "target", "assistant", "output", "reply"}
EXTENTS = {"len", "lens", "length", "lengths", "start", "starts", "begin", "end", "idx", "index", "offset", "offsets"}
EXTENTS |= {"ids", "tokens", "token", "span", "spans", "pos", "position", "positions", "boundary", "boundaries"}


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
    values = list(values) if isinstance(values, range) else values
    if not isinstance(values, (list, tuple)):
        raise ConversationError(f"its {name} must be a list")
    if len({isinstance(value, bool) for value in values}) > 1:
        raise ConversationError(f"its {name} mixes bools with numbers")
    return [scalar(value) for value in values]


def _bit(name: str, bit: Any) -> bool:
    if isinstance(bit, float) or not isinstance(bit, Integral) or bit not in (0, 1):
        raise ConversationError(f"its {name} has {bit!r}; it must be 0 or 1")
    return bool(bit)


def refuse_unread(held: Mapping[str, Any]) -> None:
    """Refuse a key that nothing reads where it has a number for each token, or may show documents or an answer."""
    length = len(held["input_ids"])
    masked = any(key in held for key in (*MASKS, "labels"))
    for key in {*held} - {*READ, *NOTES}:
        value = held[key].tolist() if hasattr(held[key], "tolist") else held[key]
        flat = list(value) if isinstance(value, (list, tuple)) else []
        if length > 1 and len(flat) == length and all(isinstance(item, Real) for item in flat):
            raise ConversationError(f"its {key} has a number for each token, and nothing reads it")
        ints = flat if all(isinstance(item, Integral) and not isinstance(item, bool) for item in flat) else []
        if ints[:1] == [0]:
            ints = [ints[i + 1] - ints[i] for i in range(len(ints) - 1)]
        if len(ints) > 1 and min(ints) > 0 and sum(ints) == length:
            raise ConversationError(f"its {key} shows several documents")
        words = words_of(key)
        divides = any(w in SIDES for w in words) and any(w in EXTENTS for w in words)
        if masked or not (divides or "span" in words or "spans" in words):
            continue
        if _is_numbers(flat) or (isinstance(value, Integral) and not isinstance(value, bool) and value != length):
            raise ConversationError(f"its {key} may say which tokens are in the loss")


def _is_numbers(values: list[Any]) -> bool:
    """Whether it is a list of numbers, or of lists of numbers of one length."""
    if any(isinstance(value, (list, tuple)) for value in values):
        inner = [value for value in values if isinstance(value, (list, tuple))]
        return len(inner) == len(values) and len({len(v) for v in inner}) == 1 and all(_is_numbers([*v]) for v in inner)
    return values != [] and all(isinstance(value, Real) for value in values)
