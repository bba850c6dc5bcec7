"""Give the documents of a shard to its packer, and count those that it has taken.

    Chunks, in the order of reading   ->   Arrivals.read()   ->   numbers and lengths, for packing/
      reader.py, stored.py                 Arrivals.settle()   ->   Ledger and Notes

A packer may be given many documents at once. What the ledger says is always as if it read them one by one: up to the
last one taken, and to the end of the data where it asked for more than there is.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.conversations.order import Shard
from nanopack.conversations.source import Source
from nanopack.errors import NEVER_SKIPPED, ConversationError, EncoderError
from nanopack.ledger import Ledger
from nanopack.notes import KEYS, Notes
from nanopack.producer.chunk import Chunk, Live, Trouble

log = logging.getLogger("nanopack")

# A run that skips this many conversations of a shard in a row stops: its data are wrong, not a few of its records.
MOST_SKIPPED_IN_A_ROW = 100
# So does one that has skipped more than half of those read, once it has read this many.
JUDGED_AFTER = 1000


def describe_or_raise(error: BaseException, conversation: int, source: Source, config: LoaderConfig) -> str:
    """Raise the error of a conversation, naming its place; with on_error="skip", return that message instead.

    Errors that are not the conversation's fault are always raised as they are.
    """
    if isinstance(error, EncoderError):
        raise EncoderError(f"{source.where(conversation)}, {error}") from error
    if not isinstance(error, Exception) or isinstance(error, NEVER_SKIPPED):
        raise error
    what = str(error) if isinstance(error, ConversationError) else f"{type(error).__name__}: {error}"
    what = f"{source.where(conversation)}, {what}"
    if config.on_error == "raise":
        raise ConversationError(f'{what}. Fix it or pass on_error="skip".') from error
    return what


class Arrivals:
    """The documents of one shard, from some read on."""

    def __init__(self, shard: Shard, source: Source, config: LoaderConfig, live: Live, logged: set[str]) -> None:
        """`live` gets the documents that are packed; `logged` is what the log names once: it grows."""
        self._shard, self._source, self._config = shard, source, config
        self._live, self._logged = live, logged
        self.sources = [Ledger() for _ in source.names or ("",)]
        """What became of the documents, by source of a mixture."""
        self.notes = Notes()
        self.num_read = 0
        """Reads that are counted."""
        self._skipped_in_a_row = 0
        # conversations that gave no document since the last one that did, and how many reads that took
        self._fruitless: set[int] = set()
        self._in_vain = 0

    def start(self, chunks: Iterator[Chunk], read: int, taken: int, counted: int | None = None) -> None:
        """Continue with these chunks, whose first read has the number `read`; `taken` documents are with the packer.

        The reads before number `counted` are counted already; None: those before `read`.
        """
        self._chunks = chunks
        self.num_read = read if counted is None else counted
        self._ended = False
        self._chunk: Chunk | None = None
        # the first read of the chunk, and the reads of it that were given or passed
        self._first, self._given = read, 0
        # the numbers that were given last, and the documents taken before these
        self._numbers, self._taken_before = np.empty(0, np.int64), taken

    def read(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return numbers and lengths of the next documents, None at the end of the data; see `packing.rows.Read`.

        Everything given before was taken. Raises ConversationError for a bad conversation (with on_error="raise"),
        ValueError where nothing can be packed.
        """
        while True:
            self._count_to(self._first + self._given)
            if (self._chunk is None or self._given == len(self._chunk.lengths)) and not self._next_chunk():
                self._ended = True
                return None
            chunk = self._chunk
            assert chunk is not None
            if (trouble := chunk.troubles.get(self._given)) is not None and trouble.error is not None:
                self._skip(trouble.error, int(chunk.conversations[self._given]))
                continue
            begin, self._given = self._given, self._end_of_sound(chunk)
            if self._has_dropped:
                kept = np.flatnonzero(~self._dropped[begin : self._given]) + begin
                lengths = chunk.lengths[kept]
            else:
                kept, lengths = np.arange(begin, self._given), chunk.lengths[begin : self._given]
            self._note_fruitless(chunk, begin, kept)
            if len(kept):
                self._taken_before += len(self._numbers)
                self._numbers = kept + self._first
                return self._numbers, lengths

    @property
    def ahead(self) -> int:
        """Documents that were given and not taken, about."""
        return self._first + self._given - self.num_read

    def _next_chunk(self) -> bool:
        """Take the next chunk; return whether there is one."""
        self._first += self._given
        self._given = 0
        self._chunk = chunk = next(self._chunks, None)
        if chunk is None:
            return False
        self._dropped = chunk.dropped(self._config)
        self._has_dropped, self._has_cut = bool(self._dropped.any()), chunk.num_tokens is not chunk.lengths
        self._troubles = sorted(chunk.troubles)
        self._of_sources = self._source.sources_of(chunk.conversations) if len(self.sources) > 1 else None
        kept = ~self._dropped
        for position, trouble in chunk.troubles.items():
            kept[position] &= trouble.error is None
        self._live.add(self._first, chunk, kept)
        return True

    def _end_of_sound(self, chunk: Chunk) -> int:
        """Return the position before which there is no error, from those given on."""
        for position in self._troubles[bisect_left(self._troubles, self._given) :]:
            if chunk.troubles[position].error is not None:
                return position
        return len(chunk.lengths)

    def took(self, taken: int) -> None:
        """Say how many documents the packer has taken in all, with those given last."""
        self._taken_before = taken - len(self._numbers)

    def settle(self, taken: int) -> None:
        """Count what was read, given how many documents the packer has taken in all."""
        own = taken - self._taken_before
        if self._ended or (own and self._config.packing.whole_passes):
            self._count_to(self._first + self._given)
        elif own:
            self._count_to(int(self._numbers[own - 1]) + 1)

    def _count_to(self, read: int) -> None:
        """Count the reads up to this number, none of which has an error."""
        if read <= self.num_read:
            return
        chunk, part = self._chunk, slice(self.num_read - self._first, read - self._first)
        assert chunk is not None
        self.num_read = read
        self._skipped_in_a_row = 0
        if self._of_sources is None:
            self._count(self.sources[0], chunk, part)
        else:
            of_part = self._of_sources[part]
            for source in np.unique(of_part).tolist():
                self._count(self.sources[source], chunk, np.flatnonzero(of_part == source) + part.start)
        for position in self._troubles[bisect_left(self._troubles, part.start) :]:
            if position >= part.stop:
                break
            self._note(chunk.troubles[position], int(chunk.conversations[position]))

    def _count(self, ledger: Ledger, chunk: Chunk, part: slice | np.ndarray) -> None:
        """Count these documents of the chunk in a ledger."""
        lengths = chunk.lengths[part]
        tokens, cut = int(np.add.reduce(lengths)), {}
        if self._has_cut:
            left = chunk.num_tokens[part]
            tokens = int(left.sum())
            for reason, limit in self._config.limits:
                cut[reason] = int(np.maximum(left - limit, 0).sum())
                left = np.minimum(left, limit)
        dropped = dropped_tokens = 0
        if self._has_dropped:
            of_part = self._dropped[part]
            dropped, dropped_tokens = int(of_part.sum()), int(lengths[of_part].sum())
        ledger.read(len(lengths), tokens, cut, dropped=dropped, dropped_tokens=dropped_tokens)
        if (copies := self._source.are_copies(chunk.conversations[part])) is not None:
            ledger.conversations_copies += int(copies.sum())

    def _skip(self, error: BaseException, conversation: int) -> None:
        """Count a bad conversation, or raise its error."""
        ledger = self.sources[self._source.source_of(conversation)]
        what = describe_or_raise(error, conversation, self._source, self._config)
        log.debug("skipped %s", what)
        self.notes.skip(what, self._source.where(conversation))
        self.num_read += 1
        self._given += 1
        ledger.conversations_copies += self._source.is_copy(conversation)
        ledger.skip()
        self._refuse_to_skip_more(what)
        self._give_up_on_nothing([conversation])

    def _refuse_to_skip_more(self, what: str) -> None:
        """Raise ConversationError where so much is skipped that hardly anything would be left."""
        self._skipped_in_a_row += 1
        skipped = sum(ledger.conversations_skipped for ledger in self.sources)
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            how = f"{self._skipped_in_a_row} conversations in a row were skipped"
        elif self.num_read >= JUDGED_AFTER and 2 * skipped > self.num_read:
            how = f"{skipped} of {self.num_read} conversations were skipped"
        else:
            return
        raise ConversationError(f'{what}. {how}; on_error="skip" is for a few bad ones: repair the data')

    def _note(self, trouble: Trouble, conversation: int) -> None:
        """Count what of a record is not read, and name it in the log where it is new."""
        where, notes = self._source.where(conversation), self.notes
        notes.ignore(trouble.ignored_keys)
        for key in trouble.ignored_keys:
            if key not in self._logged and len(self._logged) < KEYS:
                self._logged.add(key)
                log.warning("%s: nothing reads the key %r; it is named once, and counted in the ledger", where, key)
                if len(self._logged) == KEYS:
                    log.warning("%d keys are named by now; the ledger counts the others together", KEYS)
        if trouble.special_token:
            notes.texts_with_special_tokens += 1
            if "" not in self._logged:
                self._logged.add("")
                log.warning(
                    "%s: the text spells the special token %r, which stays text; for the token itself give messages or "
                    "input_ids; it is named once, and counted in the ledger",
                    where,
                    trouble.special_token,
                )

    def _note_fruitless(self, chunk: Chunk, begin: int, kept: np.ndarray) -> None:
        """Note the documents that are dropped after the last that is kept."""
        if self._config.epochs is not None or not self._has_dropped:
            if len(kept):
                self._fruitless.clear()
                self._in_vain = 0
            return
        if len(kept):
            self._fruitless, begin = set(), int(kept[-1]) + 1
            self._in_vain = 0
        if begin < self._given:
            self._give_up_on_nothing(chunk.conversations[begin : self._given].tolist())

    def _give_up_on_nothing(self, conversations: list[int]) -> None:
        """Raise ValueError where further reading can give no document any more, after these that gave none."""
        if self._config.epochs is not None:
            return
        n = self._shard.n
        self._in_vain += len(conversations)
        self._fruitless.update(conversations)
        # without a shuffle, n reads have covered every conversation that the shard will ever read
        if len(self._fruitless) == n or (self._shard.seed is None and self._in_vain >= n):
            raise ValueError(
                f"nothing to pack: in a whole pass over the data ({n} conversations) each one was dropped because "
                f"nothing in it is in the loss, or skipped as bad; look at the first, or use loss='all'"
            )
