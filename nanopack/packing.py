"""Decide which waiting documents fill the next rows, and where each one lands.

    lengths of what is read   ->   packer.next_rows()   ->   rows of runs (document, offset, length)
          producer.py                                             ring.py writes them out

Only lengths count here: no tokens, no tensors, no GPU. A packer asks for documents itself, by calling `read()`, because
when to read is part of each rule: it returns (document, length), or None at the end of the data. What a document is
does not matter, as long as it can be a key and equals only itself.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

Read = Callable[[], "tuple[Any, int] | None"]
State = dict[str, Any]
"""Numbers and lists of numbers, by name."""

PACKINGS = ("best_fit", "stream", "best_fit_pad", "best_fit_crop", "pad")
WINDOWS = {"best_fit": 64, "best_fit_pad": 100, "best_fit_crop": 1000}
MAX_AGE = 128
_COUNTERS = ("emitted", "cropped", "packed", "longest_wait")


class Run(NamedTuple):
    """Tokens `offset` to `offset + length` of one document, side by side in one row."""

    document: Any
    offset: int
    length: int


Row = list[Run]


class Piece(NamedTuple):
    """A run of one document in one row, as the batch tells it."""

    conversation: int
    """Index of the conversation in the data set."""
    start: int
    """First column."""
    length: int
    """Tokens."""
    offset: int
    """Token of the document that stands in the first column."""


class Packer(Protocol):
    """What the producer and the ledger need of a packing."""

    emitted: int
    """Tokens handed out so far, each counted once."""
    cropped: int
    """Tokens cut from documents that were placed in part."""
    packed: int
    """Documents of which nothing is left to come."""
    longest_wait: int
    """Most rows that a document has waited before it was placed."""

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""

    def held(self) -> list[Any]:
        """Return the documents of which later rows will take something, in the order that `restore` wants."""

    def left(self) -> list[tuple[Any, int]]:
        """Return each document of which something is still to come, and how many of its tokens."""

    def state(self) -> State:
        """Return what else than the documents held decides the rows to come, and the counters."""

    def restore(self, state: State, held: Sequence[tuple[Any, int]]) -> None:
        """Stand where a packer stood: its state, and (document, length) of what it held."""

    @property
    def waiting_documents(self) -> int:
        """Documents read of which something is still to come."""

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are still to come."""


def _counters(packer: Packer) -> State:
    return {name: getattr(packer, name) for name in _COUNTERS}


def _set_counters(packer: Packer, state: State) -> None:
    for name in _COUNTERS:
        setattr(packer, name, state[name])


def make_packer(
    packing: str,
    read: Read,
    *,
    batch_size: int,
    seq_len: int,
    window: int | None = None,
    max_age: int | None = None,
    refill: int = 1,
    overlap: bool = False,
) -> Packer:
    """Return the packer of that name for rows of `seq_len + 1` tokens."""
    if packing == "stream":
        return Stream(read, batch_size, seq_len, overlap=overlap)
    if packing == "pad":
        return OneEach(read, batch_size)
    return BestFit(
        read,
        batch_size,
        seq_len + 1,
        window=window or WINDOWS[packing],
        refill=refill,
        max_age=(max_age or MAX_AGE) if packing == "best_fit" else None,
        crop=packing == "best_fit_crop",
    )


class Stream:
    """Documents end to end: a batch is the next B*T+1 tokens, a row T+1 of them, sharing one with the next row.

    This is nanochat's midtraining loader. With `overlap`, the last token of a batch is the first of the next one.

    >>> lengths = iter([(0, 6), (1, 12)])
    >>> Stream(lambda: next(lengths), batch_size=2, seq_len=4, overlap=False).next_rows()
    [[Run(document=0, offset=0, length=5)], [Run(document=0, offset=4, length=2), Run(document=1, offset=0, length=3)]]
    """

    def __init__(self, read: Read, batch_size: int, seq_len: int, *, overlap: bool) -> None:
        self._read = read
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._overlap = overlap
        self._carried: Run | None = None
        # the documents of which something waits, in order; of the first one `_offset` tokens are gone
        self._queue: deque[tuple[Any, int]] = deque()
        self._offset = 0
        self.waiting_tokens = 0
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def held(self) -> list[Any]:
        """Return the document of the carried token, if there is one, then those in the queue."""
        return [item[0] for item in (*filter(None, [self._carried]), *self._queue)]

    def left(self) -> list[tuple[Any, int]]:
        """Return each document of which something is still to come, and how many of its tokens."""
        return [(item[0], item[1] - (self._offset if n == 0 else 0)) for n, item in enumerate(self._queue)]

    def state(self) -> State:
        """Return the counters, and where in the first documents it stands."""
        carried = -1 if self._carried is None else self._carried.offset
        return {"carried": carried, "offset": self._offset, **_counters(self)}

    def restore(self, state: State, held: Sequence[tuple[Any, int]]) -> None:
        """Stand where a packer stood: its state, and (document, length) of what it held."""
        _set_counters(self, state)
        self._offset = state["offset"]
        if state["carried"] >= 0:
            (document, _), *held = held
            self._carried = Run(document, state["carried"], 1)
        self._queue = deque(held)
        self.waiting_tokens = sum(length for _, length in held) - self._offset

    @property
    def waiting_documents(self) -> int:
        """Documents read of which something is still to come."""
        return len(self._queue)

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""
        runs = [self._carried] if self._carried else []
        wanted = self._batch_size * self._seq_len + 1 - len(runs)
        while self.waiting_tokens < wanted and (item := self._read()) is not None:
            self._queue.append(item)
            self.waiting_tokens += item[1]
        if not self.waiting_tokens:
            return []
        self._take(min(wanted, self.waiting_tokens), runs)
        if self._overlap:
            document, offset, length = runs[-1]
            self._carried = Run(document, offset + length - 1, 1)
        return _split_in_rows(runs, self._batch_size, self._seq_len)

    def _take(self, tokens: int, runs: list[Run]) -> None:
        """Move the next tokens from the queue to the runs."""
        self.waiting_tokens -= tokens
        self.emitted += tokens
        while tokens:
            document, length = self._queue[0]
            run = Run(document, self._offset, min(tokens, length - self._offset))
            _append(runs, run)
            tokens -= run.length
            self._offset += run.length
            if self._offset == length:
                self._queue.popleft()
                self._offset = 0
                self.packed += 1


def _split_in_rows(runs: list[Run], batch_size: int, seq_len: int) -> list[Row]:
    """Cut up to B*T+1 tokens into B rows of T; each row also gets the token after it, which is its last target."""
    rows: list[Row] = [[]]
    room = seq_len
    for document, offset, length in runs:
        while length:
            if not room:
                _append(rows[-1], Run(document, offset, 1))
                if len(rows) == batch_size:
                    break
                rows.append([])
                room = seq_len
            part = min(length, room)
            _append(rows[-1], Run(document, offset, part))
            offset, length, room = offset + part, length - part, room - part
    return rows


def _append(runs: list[Run], run: Run) -> None:
    """Put a run behind the others, as one with the last where it goes on with the same document."""
    if runs and runs[-1].document == run.document and runs[-1].offset + runs[-1].length == run.offset:
        runs[-1] = Run(run.document, runs[-1].offset, runs[-1].length + run.length)
    else:
        runs.append(run)


class OneEach:
    """One document a row: the baseline."""

    def __init__(self, read: Read, batch_size: int) -> None:
        self._read = read
        self._batch_size = batch_size
        self.waiting_documents = self.waiting_tokens = 0
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def held(self) -> list[Any]:
        """Return nothing: no document waits."""
        return []

    def left(self) -> list[tuple[Any, int]]:
        """Return nothing: no document waits."""
        return []

    def state(self) -> State:
        """Return the counters."""
        return _counters(self)

    def restore(self, state: State, held: Sequence[tuple[Any, int]]) -> None:
        """Stand where a packer stood: its counters."""
        _set_counters(self, state)

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""
        rows: list[Row] = []
        while len(rows) < self._batch_size and (item := self._read()) is not None:
            document, length = item
            rows.append([Run(document, 0, length)])
            self.emitted += length
            self.packed += 1
        return rows


class BestFit:
    """Each row takes, again and again, the longest waiting document that fits its rest, first come among equals.

    Before each choice the waiting list is refilled, `refill` documents at a time, until `window` wait. When none fits,
    the row ends there, or with `crop` takes the beginning of the shortest (the rest of that document is dropped). With
    `max_age`, a document that has waited so many rows opens the next one. nanochat's SFT loader is the plain form,
    its pretraining loader the one with `crop`.
    """

    def __init__(
        self,
        read: Read,
        batch_size: int,
        capacity: int,
        *,
        window: int,
        refill: int = 1,
        max_age: int | None = None,
        crop: bool = False,
    ) -> None:
        self._read = read
        self._batch_size = batch_size
        self._capacity = capacity
        self._window = window
        self._refill = refill
        self._max_age = max_age
        self._crop = crop
        self._ended = False
        self._row = 0
        # document -> (length, row in which it was read); the first entry has waited longest
        self._waiting: OrderedDict[Any, tuple[int, int]] = OrderedDict()
        self._lengths = _Lengths(capacity)
        self.waiting_tokens = 0
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def held(self) -> list[Any]:
        """Return what waits, in the order of reading."""
        return list(self._waiting)

    def left(self) -> list[tuple[Any, int]]:
        """Return each document of which something is still to come, and how many of its tokens."""
        return [(document, length) for document, (length, _) in self._waiting.items()]

    def state(self) -> State:
        """Return the counters, the row that comes next, and the rows in which what waits was read."""
        return {"row": self._row, "since": [row for _, row in self._waiting.values()], **_counters(self)}

    def restore(self, state: State, held: Sequence[tuple[Any, int]]) -> None:
        """Stand where a packer stood: its state, and (document, length) of what it held."""
        _set_counters(self, state)
        self._row = state["row"]
        for (document, length), since in zip(held, state["since"], strict=True):
            self._add(document, length, since)

    @property
    def waiting_documents(self) -> int:
        """Documents read of which something is still to come."""
        return len(self._waiting)

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""
        rows: list[Row] = []
        while len(rows) < self._batch_size and (row := self._next_row()):
            rows.append(row)
            self._row += 1
        return rows

    def _next_row(self) -> Row:
        row: Row = []
        room = self._capacity
        while room:
            self._read_more()
            length = self._choose(room, opens=not row)
            if length is None:
                break
            document = self._lengths.pop(length)
            taken = min(length, room)
            self._place(document, taken)
            row.append(Run(document, 0, taken))
            room -= taken
        return row

    def _read_more(self) -> None:
        while len(self._waiting) < self._window and not self._ended:
            for _ in range(self._refill):
                item = self._read()
                if item is None:
                    self._ended = True
                    break
                self._add(*item, self._row)

    def _add(self, document: Any, length: int, row: int) -> None:
        self._waiting[document] = (length, row)
        self._lengths.add(document, length)
        self.waiting_tokens += length

    def _choose(self, room: int, *, opens: bool) -> int | None:
        """Return the length of the document to place next (the first that came with it is meant), or None."""
        if not self._waiting:
            return None
        if opens and self._max_age is not None:
            length, read_in_row = next(iter(self._waiting.values()))
            if self._row - read_in_row >= self._max_age:
                return length
        fitting = self._lengths.longest(room)
        return self._lengths.shortest() if fitting is None and self._crop else fitting

    def _place(self, document: Any, taken: int) -> None:
        length, read_in_row = self._waiting.pop(document)
        self.waiting_tokens -= length
        self.emitted += taken
        self.packed += 1
        self.cropped += length - taken
        self.longest_wait = max(self.longest_wait, self._row - read_in_row)


class _Lengths:
    """Waiting documents by length: adding and choosing cost the same however many wait.

    One queue a length, and one big integer whose bit n says that a document of length n waits: the longest that fits
    is its highest bit below the room, the shortest its lowest bit. Documents longer than a row never fit; they lie in
    a heap, and only the shortest of them is ever asked for.
    """

    def __init__(self, capacity: int) -> None:
        self._queues: dict[int, deque[Any]] = {}
        self._bits = 0
        self._capacity = capacity
        self._over_long: list[int] = []

    def add(self, document: Any, length: int) -> None:
        queue = self._queues.get(length)
        if queue is None:
            self._queues[length] = deque((document,))
            if length <= self._capacity:
                self._bits |= 1 << length
            else:
                heapq.heappush(self._over_long, length)
        else:
            queue.append(document)

    def longest(self, room: int) -> int | None:
        """Return the greatest length up to `room` that waits, or None."""
        fitting = self._bits & ((2 << room) - 1)
        return fitting.bit_length() - 1 if fitting else None

    def shortest(self) -> int:
        """Return the least length that waits."""
        return (self._bits & -self._bits).bit_length() - 1 if self._bits else self._over_long[0]

    def pop(self, length: int) -> Any:
        """Take out the document of that length that came first; of over-long ones only the shortest can be meant."""
        queue = self._queues[length]
        document = queue.popleft()
        if not queue:
            del self._queues[length]
            if length <= self._capacity:
                self._bits ^= 1 << length
            else:
                heapq.heappop(self._over_long)
        return document
