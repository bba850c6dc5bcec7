"""Cut a text that a chat template wrote into what can be encoded apart, with what of it is in the loss.

    text, spans in the loss, its added tokens   ->   plan_of()   ->   Plan   ->   document.py encodes it

A tokenizer cuts at its added tokens too, and encodes each text between them by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from nanopack.render.document import Plan
from nanopack.render.hf_spans import Span
from nanopack.tokenizers.added_tokens import WHITE_SPACE, Found
from nanopack.tokenizers.buffers import as_buffer


def plan_of(text: str, spans: Sequence[Span], tokens: Sequence[Found], *, trims: bool) -> Plan:
    """Return the plan of a text; `spans` in order, none empty. `trims`: whether offsets leave out blanks."""
    runs: list[str | bytes] = []
    in_loss: list[bool] = []
    marked: list[tuple[int, int, int]] = []
    for begin, end, id in _pieces(len(text), tokens):
        if id is not None:
            runs.append(as_buffer([id]))
            if trims:
                begin, end = _without_blanks(text, begin, end)
            in_loss.append(any(a < end and b > begin for a, b in spans))
            continue
        within = [(max(a, begin), b) for a, b in spans if a < end and b > begin]
        run = text[begin:end]
        for a, b in within:
            # A blank at the run's end, which has no place in offsets, is in a span that continues.
            marked.append((len(runs), num_bytes(run[: a - begin]), num_bytes(run[: b - begin]) + (b > end)))
        runs.append(run)
        in_loss.append(False)
    return Plan(runs, in_loss, [], marked)


def num_bytes(text: str) -> int:
    """Return the length of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _without_blanks(text: str, begin: int, end: int) -> Span:
    """Return the begin and end of an added token, without the white space that it takes."""
    token = text[begin:end].lstrip(WHITE_SPACE)
    return end - len(token), end - len(token) + len(token.rstrip(WHITE_SPACE))


def _pieces(length: int, tokens: Iterable[Found]) -> Iterator[tuple[int, int, int | None]]:
    """Yield from where to where each token and each text between stands, and the token's id."""
    done = 0
    for id, begin, end in chain(tokens, [(None, length, length)]):
        if done < begin:
            yield done, begin, None
        if id is not None:
            yield begin, end, id
        done = end
