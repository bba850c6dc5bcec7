"""Mix several sources of conversations into one, each with a share of it.

    lists, files, data sets, each with a weight   ->   mixture()   ->   Mixture[i], a record of one of them
              records.py opens each                                     Loader takes it as its conversations

The arguments alone decide, at construction, which record pick number i is: every rank and machine picks the same, in
any order. Records are read on demand; only by="token" renders a sample first, to measure it.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import operator
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from nanopack.checks import check_choice, check_int
from nanopack.config import TemplateName
from nanopack.conversations.fetch import peek
from nanopack.conversations.files import Files
from nanopack.conversations.records import Conversation, check, short
from nanopack.conversations.source import Source
from nanopack.errors import NEVER_SKIPPED
from nanopack.render.document import Document
from nanopack.render.renderer import Renderer
from nanopack.render.templates import Template
from nanopack.store.opening import open_data
from nanopack.tokenizers.tokenizer import TokenizerLike, for_template, load_tokenizer

SharesBy: TypeAlias = Literal["conversation", "token"]
SHARES_BY = get_args(SharesBy)
# Conversations of a source that are rendered to measure their mean length.
SAMPLE = 512
# Picks are kept as uint32.
MAX_PICKS = 2**32
# A source's two streams of random numbers: where its picks go, and the order of its conversations.
POSITIONS, ORDER = 0, 1


class Mixture(Source):
    """Conversations of several sources in one order, made by `mixture`; `Loader` and `mixture` itself take it.

    Immutable, so forked processes and threads may share it if its sources allow that. It pickles if its sources do.
    Memory: 4 bytes per pick.
    """

    names: tuple[str, ...]
    """Name of each source: the one given, else its path or glob, else 'source 0', 'source 1', ..."""

    def __init__(self, sources: Sequence[Source], names: Sequence[str], picks: np.ndarray) -> None:
        """Set `picks`, (n,) uint32: conversation numbers, counted through all sources in turn."""
        self.names = tuple(names)
        self._sources = tuple(sources)
        self._starts = list(accumulate((len(source) for source in sources), initial=0))[:-1]
        self._picks = picks
        self.runs_foreign_code = any(source.runs_foreign_code for source in sources)

    def __len__(self) -> int:
        """Return the number of picks in one pass."""
        return len(self._picks)

    def __getitem__(self, index: int) -> object:
        """Return the record of pick number `index`, as its source returns it."""
        source, conversation = self._find(index)
        return self._sources[source][conversation]

    def where(self, index: int) -> str:
        """Return the location of the record in its source: 'chats.jsonl:17', or 'conversation 17 of source 0'."""
        number, conversation = self._find(index)
        source = self._sources[number]
        location = source.where(conversation)
        # A file's name and line are enough.
        return location if isinstance(source, Files) else f"{location} of {self.names[number]}"

    def source_of(self, index: int) -> int:
        """Return the source of the record: its index in the list given, and in `names`."""
        return self._find(index)[0]

    def version(self) -> str:
        """Return the versions of all sources, "" where one is not known."""
        versions = [source.version() for source in self._sources]
        return repr((versions, self.picks_digest())) if all(versions) else ""

    def sources_of(self, indices: np.ndarray) -> np.ndarray:
        """Return `source_of` of picks, (n,) int64."""
        sources: np.ndarray = np.searchsorted(self._starts, self._picks[indices], "right") - 1
        return sources

    @property
    def parts(self) -> tuple[Source, ...]:
        return tuple(part for source in self._sources for part in source.parts)

    def objects(self) -> tuple[object, ...]:
        """Return the objects of the user's that its sources read."""
        return tuple(one for source in self._sources for one in source.objects())

    def find(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for picks, (n,) int64, which of the `parts` each is in, and its index there: (n,) int64 each."""
        picks = self._picks[indices].astype(np.int64)
        sources = np.searchsorted(self._starts, picks, "right") - 1
        parts, inner, before = np.empty(len(picks), np.int64), picks - np.array(self._starts)[sources], 0
        for number, source in enumerate(self._sources):
            own = np.flatnonzero(sources == number)
            of_own, inner[own] = source.find(inner[own])
            parts[own] = of_own + before
            before += len(source.parts)
        return parts, inner

    def picks_digest(self) -> str:
        """Return a digest of all picks, which depend on the sizes of the sources, their weights and the seed."""
        return hashlib.sha256(self._picks.tobytes()).hexdigest()

    def _find(self, index: int) -> tuple[int, int]:
        """Return the source of a pick, and its conversation there."""
        if not 0 <= index < len(self._picks):
            raise IndexError(f"conversation {index} of {len(self._picks)}")
        pick = int(self._picks[operator.index(index)])
        source = bisect_right(self._starts, pick) - 1
        return source, pick - self._starts[source]


def mixture(
    sources: Sequence[tuple[Any, float] | tuple[Any, float, str]],
    seed: int = 0,
    *,
    by: SharesBy = "conversation",
    tokenizer: TokenizerLike | None = None,
    template: TemplateName | Template = "nanochat",
) -> Mixture:
    """Return the conversations of all sources, shuffled, in the proportions of their weights.

    A pass over the mixture is as short as it can be with every conversation in it: the source that is largest for its
    share comes exactly once, to a pick, and the others repeat, each time in a new order, until their shares are full.
    Shares are exact to one pick in the whole pass, and in its first i picks, for any i, to one pick per source. A
    second pass (`epochs=2`) repeats the first.

    Args:
        sources: a list of (source, weight) or (source, weight, name). A source is anything that `Loader` takes as
            conversations, a mixture included. A weight is a number above 0, relative to the other weights; a float
            means the decimal that it prints as, so 0.7 and 0.3 are the same as 7 and 3.
        seed: an int from 0; the same seed gives the same picks on any machine and with any version of numpy.
        by: `"conversation"`: weights are shares of the conversations. `"token"`: of the tokens before cutting, which is
            an estimate: the mean length of each source is measured on up to 512 evenly spaced conversations. The
            ledger has the actual shares.
        tokenizer, template: how to measure tokens, as of `Loader`; only with by="token".

    Construction briefly takes 30 to 55 bytes per pick. Raises ValueError for an invalid argument, naming where it is.

    >>> mixed = mixture([([{"text": "a"}, {"text": "b"}, {"text": "c"}], 3), ([{"text": "x"}], 1, "letters")], seed=4)
    >>> [mixed[i]["text"] for i in range(len(mixed))], mixed.names
    (['c', 'b', 'x', 'a'], ('source 0', 'letters'))
    """
    check_int("seed", seed, least=0)
    measure = _measure(by, tokenizer, template)
    if not isinstance(sources, (list, tuple)) or not sources:
        raise ValueError(f"sources={short(sources)} is not allowed; give a list of at least one (source, weight)")
    weights, names, opened = zip(*(_open(f"sources[{i}]", i, item) for i, item in enumerate(sources)), strict=True)
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two sources have the name {double!r}; give (source, weight, name) with different names")
    if measure is not None:
        # The longer the conversations of a source are, the fewer hold its share of the tokens.
        lengths = [_mean_length(f"sources[{i}]", source, measure) for i, source in enumerate(opened)]
        weights = tuple(weight / length for weight, length in zip(weights, lengths, strict=True))
    sizes = [len(source) for source in opened]
    return Mixture(opened, names, _pick(sizes, _count(sizes, weights, names), seed))


def _measure(
    by: SharesBy, tokenizer: TokenizerLike | None, template: TemplateName | Template
) -> Callable[[Conversation], Document] | None:
    """Return the renderer to measure lengths with, None where they do not matter."""
    check_choice("by", by, SHARES_BY)
    if by == "token":
        if tokenizer is None:
            raise ValueError("by='token' needs a tokenizer to measure lengths; pass tokenizer=, and the template=")
        return Renderer(for_template(load_tokenizer(tokenizer), template), template)
    # A tokenizer given here would be taken to mean that tokens are counted.
    if tokenizer is not None:
        raise ValueError("tokenizer has no meaning with by='conversation'; leave it out, or use by='token'")
    return None


def _open(place: str, number: int, item: object) -> tuple[Fraction, str, Source]:
    """Return weight, name and conversations of one source."""
    if not isinstance(item, (list, tuple)) or len(item) not in (2, 3):
        raise ValueError(f"{place}={short(item)} is not a pair; give (source, weight) or (source, weight, name)")
    conversations, weight = item[:2]
    is_path = isinstance(conversations, (str, os.PathLike))
    name = item[2] if len(item) == 3 else os.fsdecode(conversations) if is_path else f"source {number}"
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place}: name={short(name)} is not allowed; give a str that is not empty, or leave it out")
    if not _is_weight(weight):
        raise ValueError(f"{place}: weight={short(weight)} is not allowed; give a number above 0, or drop the source")
    try:
        source = open_data(conversations, shuffled=True)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    # The decimal as written, so that no binary rounding decides how many picks a pass has.
    return Fraction(str(weight)), name, source


def _is_weight(weight: Any) -> bool:
    # A bool is a number in Python, but nobody means it as a weight; NaN is not below infinity.
    return isinstance(weight, numbers.Real) and not isinstance(weight, bool) and weight < math.inf and not weight <= 0


def _mean_length(place: str, source: Source, render: Callable[[Conversation], Document]) -> Fraction:
    """Return the mean number of tokens per conversation of an evenly spaced sample, without the bad ones."""
    n = len(source)
    sample = min(SAMPLE, n)
    lengths, first_error = [], ""
    for index in (number * n // sample for number in range(sample)):
        try:
            lengths.append(len(render(check(peek(source, index, None))).ids))
        except NEVER_SKIPPED:
            raise
        # A data set may raise anything; Loader too calls a conversation bad for it.
        except Exception as error:
            first_error = first_error or f"{source.where(index)}, {error}"
    if not lengths:
        raise ValueError(
            f"{place}: all {sample} conversations of the sample are bad, so its length cannot be measured. "
            f"The first: {first_error}. Fix them, or use by='conversation'"
        )
    return Fraction(sum(lengths), len(lengths))


def _count(sizes: Sequence[int], weights: Sequence[Fraction], names: Sequence[str]) -> list[int]:
    """Return the number of picks of each source in a pass: shares rounded by largest remainder, none below its size.

    >>> _count([3, 1, 1], [Fraction(1), Fraction(1), Fraction(2, 3)], "abc")
    [3, 3, 2]
    """
    total = sum(weights)
    needed = [math.ceil(size * total / weight) for size, weight in zip(sizes, weights, strict=True)]
    picks = max(needed)
    if picks > MAX_PICKS:
        rarest = needed.index(picks)
        raise ValueError(
            f"sources[{rarest}] ({names[rarest]}) has {sizes[rarest]} conversations and a share of "
            f"{float(weights[rarest] / total):.3g}: including each once takes {picks} picks, and at most {MAX_PICKS} "
            "are allowed; raise its weight, or give fewer of its conversations"
        )
    exact = [picks * weight / total for weight in weights]
    counts = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(counts)), key=lambda source: counts[source] - exact[source])
    for source in by_remainder[: picks - sum(counts)]:
        counts[source] += 1
    return counts


def _pick(sizes: Sequence[int], counts: Sequence[int], seed: int) -> np.ndarray:
    """Return the picks of a pass, (sum(counts),) uint32, as `Mixture` takes them.

    Pick k of a source with `count` picks goes to a random position in the k-th of `count` equal stretches of the pass
    (stratified sampling): a source is never far from its share, and never in step with ranks or rows.
    """
    positions = np.empty(sum(counts), np.float64)
    picks = np.empty(len(positions), np.uint32)
    begin = start = 0
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        end = begin + count
        # A float64 keeps 53 bits; numpy does not promise that its own conversion never changes.
        within = (_random(seed, source, POSITIONS, count) >> np.uint64(11)) * 2.0**-53
        positions[begin:end] = (np.arange(count) + within) / count
        picks[begin:end] = _orders(_random(seed, source, ORDER, -(-count // size) * size), size)[:count]
        picks[begin:end] += np.uint32(start)
        begin, start = end, start + size
    # Stable, so that equal positions have the same order everywhere.
    return picks[np.argsort(positions, kind="stable")]


def _orders(random: np.ndarray, size: int) -> np.ndarray:
    """Return the numbers below `size`, in a new order for each `size` random numbers: (len(random),) int64."""
    return random.reshape(-1, size).argsort(axis=1, kind="stable").reshape(-1)


def _random(seed: int, source: int, purpose: int, n: int) -> np.ndarray:
    """Return (n,) uint64, the same in every version of numpy, which promises that for bit generators only."""
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(source, purpose))).random_raw(n)
