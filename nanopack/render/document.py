"""What a rendered conversation is, before and after its texts are encoded.

renderer.py, hf_template.py   ->   Plan   ->   encode()   ->   Document
                                                                producer/reader.py cuts it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanopack.errors import EncoderError
from nanopack.tokenizers.byte_level import REMEDY, ByteLevel
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.tokenizer import AnyTokenizer

# The end of a span that lasts to the end of its run.
END = 1 << 40


@dataclass(frozen=True, eq=False)
class Document:
    """A rendered conversation. Its first token is the beginning of sequence."""

    ids: np.ndarray
    """(n,) uint32, or of other integers where it was rendered elsewhere: token ids."""
    mask: np.ndarray
    """(n,) bool: True where the token is in the loss."""
    starts: tuple[int, ...]
    """Index of the token that each message begins with, one per message; none for plain text and with
    template="hf". A system message that was merged begins where the user's does."""
    forgets: bool = False
    """Whether the chat template left out thoughts of earlier turns."""


class Plan(NamedTuple):
    """A document before encoding: runs that follow each other."""

    runs: list[str | bytes]
    """Texts to encode, and ids that are known already, as bytes of uint32."""
    in_loss: list[bool]
    """Of each run, whether its tokens are in the loss."""
    firsts: list[int]
    """For each message, the run that it begins with."""
    spans: Sequence[tuple[int, int, int]] = ()
    """Run, and from which to before which of its bytes, or END, it is in the loss: any token that has one of them."""
    forgets: bool = False
    """Whether the chat template left out thoughts of earlier turns."""
    is_cut: bool = False
    """Whether no text in it holds an added token of a Hugging Face tokenizer."""
    expected: Document | None = None
    """What must come out, where it was rendered in another way too, to compare the two."""


def encode(tokenizer: AnyTokenizer, plans: Sequence[Plan]) -> Iterator[Document]:
    """Yield the document of each plan, as views of arrays that they share; raise as the tokenizer does.

    EncoderError where one is not what is expected.
    """
    if not plans:
        return
    runs = [run for plan in plans for run in plan.runs]
    if isinstance(tokenizer, HuggingFaceTokenizer) and all(plan.is_cut for plan in plans):
        ids, offsets = tokenizer.encode_batch(runs, are_cut=True)
    else:
        ids, offsets = tokenizer.encode_batch(runs)
    mask = np.array([in_loss for plan in plans for in_loss in plan.in_loss], bool).repeat(np.diff(offsets))
    _mark_spans(tokenizer, plans, ids, offsets, mask)
    begins, first = offsets.tolist(), 0
    for plan in plans:
        last = first + len(plan.runs)
        begin, end = begins[first], begins[last]
        starts = tuple([begins[first + run] - begin for run in plan.firsts])
        document = Document(ids[begin:end], mask[begin:end], starts, plan.forgets)
        if plan.expected is not None:
            _compare(document, plan.expected)
        yield document
        first = last


def _mark_spans(
    tokenizer: AnyTokenizer, plans: Sequence[Plan], ids: np.ndarray, offsets: np.ndarray, mask: np.ndarray
) -> None:
    """Put tokens into the loss that stand in a plan's spans."""
    firsts = np.cumsum([0, *(len(plan.runs) for plan in plans)]).tolist()
    spans = [
        (first + run, *bytes_of) for first, plan in zip(firsts, plans, strict=False) for run, *bytes_of in plan.spans
    ]
    if not spans:
        return
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.byte_level
    runs, first_bytes, last_bytes = np.array(spans, np.int64).T
    starts, stops = offsets[runs], offsets[runs + 1]
    # No token has less than a byte, so that no more tokens need be looked at than bytes.
    needed = np.minimum(stops - starts, np.where(last_bytes == END, first_bytes, last_bytes))
    at = np.cumsum(needed) - needed
    some = ids[np.repeat(starts - at, needed) + np.arange(needed.sum())]
    begins, ends, before = _bytes_of_tokens(tokenizer.byte_level, some)
    base = before[at]
    first = starts + np.clip(np.searchsorted(ends, base + first_bytes, "right") - at, 0, needed)
    last = starts + np.clip(np.searchsorted(begins, base + last_bytes, "left") - at, 0, needed)
    last[last_bytes == END] = stops[last_bytes == END]
    for one, other in zip(first.tolist(), last.tolist(), strict=True):
        mask[one:other] = True


def _bytes_of_tokens(encoding: ByteLevel, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return from which to before which byte each token stands, as offsets say it, and the bytes before each."""
    before = np.concatenate([[0], np.cumsum(encoding.num_bytes[ids])])
    begins, ends = before[:-1], before[1:]
    if encoding.leading is None or encoding.trailing is None:
        return begins, ends, before
    begins = np.minimum(begins + encoding.leading[ids], ends)
    return begins, np.maximum(ends - encoding.trailing[ids], begins), before


def _compare(found: Document, expected: Document) -> None:
    if np.array_equal(found.ids, expected.ids) and np.array_equal(found.mask, expected.mask):
        return
    both = min(len(found.ids), len(expected.ids))
    unlike = (found.ids[:both] != expected.ids[:both]) | (found.mask[:both] != expected.mask[:both])
    at = int(np.argmax(np.append(unlike, True)))
    here = slice(at, at + 6)
    raise EncoderError(
        f"tiktoken's document differs from the chat template's own at token {at}: expected "
        f"{expected.ids[here].tolist()} with {expected.mask[here].tolist()} in the loss, got "
        f"{found.ids[here].tolist()} with {found.mask[here].tolist()}; {REMEDY}"
    )
