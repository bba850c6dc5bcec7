"""Count what happened to every conversation, token and position, so that nothing is lost without a number.

producer/shard.py counts as it reads and packs   ->   Ledger, one a source   ->   loader.ledger(), nanopack pack
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from nanopack.notes import Notes, Skipped

DROPPED = ("untrained",)
POSITIONS = ("positions", "positions_tokens", "positions_padding", "targets_in_loss", "work")
CUT = ("max_document_tokens", "seq_len", "crop")


class ConversationCounts(TypedDict):
    """What became of conversations; `read` is the sum of the others but `copies`."""

    read: int
    packed: int
    dropped: dict[str, int]
    skipped: int
    waiting: int
    copies: int


class TokenCounts(TypedDict):
    """What became of tokens; `read` is the sum of the others."""

    read: int
    emitted: int
    cut: dict[str, int]
    dropped: int
    waiting: int


class PositionCounts(TypedDict):
    """Positions of all batches; `total` is the sum of the others."""

    total: int
    tokens: int
    padding: int


class SourceReport(TypedDict):
    """The part of a ledger that is counted for each source of a mixture too."""

    conversations: ConversationCounts
    tokens: TokenCounts


class LoaderReport(SourceReport):
    """The part of a ledger that every loader has."""

    positions: PositionCounts
    targets: dict[str, int]
    work: float
    skipped: dict[str, Skipped]
    ignored_keys: dict[str, int]
    texts_with_special_tokens: int
    balanced: bool
    imbalances: list[str]


class LedgerReport(LoaderReport, total=False):
    """What `Loader.ledger` returns; see `Ledger` for each counter. Only a mixture has `sources`."""

    sources: dict[str, SourceReport]


@dataclass
class Ledger:
    """Counters of the documents of one source, or of a batch's positions, or sums of these.

    `imbalances` compares them with each other.
    """

    conversations_read: int = 0
    conversations_packed: int = 0
    conversations_dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROPPED, 0))
    """By reason: `untrained`, nothing in it is in the loss."""
    conversations_skipped: int = 0
    """Bad ones, with on_error="skip"."""
    conversations_waiting: int = 0
    conversations_copies: int = 0
    """Of those read, documents that repeat the history of a conversation for its second and later answers."""
    tokens_read: int = 0
    """Of every rendered conversation, before anything is cut."""
    tokens_emitted: int = 0
    """In batches, each counted once."""
    tokens_cut: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CUT, 0))
    """By reason: `max_document_tokens`, `seq_len` (longer than a row), `crop` (by best_fit_crop, to fill a row)."""
    tokens_dropped: int = 0
    """Of dropped conversations, after cutting."""
    tokens_waiting: int = 0
    positions: int = 0
    """Positions in `inputs`: B * T a batch."""
    positions_tokens: int = 0
    positions_padding: int = 0
    targets_in_loss: int = 0
    work: float = 0.0
    """What the documents cost by `balance`; 0.0 without."""

    def skip(self) -> None:
        """Count a bad conversation that is skipped."""
        self.conversations_read += 1
        self.conversations_skipped += 1

    def read(
        self, documents: int, tokens: int, cut: Mapping[str, int], *, dropped: int = 0, dropped_tokens: int = 0
    ) -> None:
        """Count documents and their tokens, without the `cut` ones (by reason); they wait, but for the `dropped`."""
        self.conversations_read += documents
        self.tokens_read += tokens
        for reason, count in cut.items():
            self.tokens_cut[reason] += count
            tokens -= count
        self.conversations_dropped["untrained"] += dropped
        self.tokens_dropped += dropped_tokens
        self.conversations_waiting += documents - dropped
        self.tokens_waiting += tokens - dropped_tokens

    def emit(self, tokens: int, *, ended: int) -> None:
        """Count tokens that were placed in a row; with them, `ended` documents are placed as a whole."""
        self.tokens_waiting -= tokens
        self.tokens_emitted += tokens
        self.conversations_waiting -= ended
        self.conversations_packed += ended

    def crop(self, tokens: int) -> None:
        """Count tokens at the end of a waiting document that are cut off to fill a row."""
        self.tokens_waiting -= tokens
        self.tokens_cut["crop"] += tokens

    def state(self) -> dict[str, Any]:
        """Return the counters as plain data (JSON-able), always with the same keys."""
        cut, dropped = {**self.tokens_cut}, {**self.conversations_dropped}
        return {**vars(self), "conversations_dropped": dropped, "tokens_cut": cut}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Ledger:
        """Return the ledger of a state."""
        ledger = cls()
        for name, value in state.items():
            setattr(ledger, name, dict(value) if isinstance(value, Mapping) else value)
        return ledger

    @classmethod
    def total(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """Return the sums of all counters."""
        total = cls()
        for ledger in ledgers:
            for name, value in vars(ledger).items():
                one = getattr(total, name)
                summed = (
                    {reason: one[reason] + value[reason] for reason in one} if isinstance(one, dict) else one + value
                )
                setattr(total, name, summed)
        return total

    def only_positions(self) -> Ledger:
        """Return a ledger with the counters of positions alone."""
        return Ledger(**{name: value for name, value in vars(self).items() if name in POSITIONS})

    def without_positions(self) -> Ledger:
        """Return a ledger with the counters of documents alone."""
        return Ledger(**{name: v for name, v in self.state().items() if name not in POSITIONS})

    def imbalances(self, *, dealt: bool = False) -> list[str]:
        """Return in words what does not add up; nothing in a sound ledger.

        With `dealt`, the batches have rows of other ranks' documents.
        """
        sums = [
            (
                "conversations read",
                self.conversations_read,
                self.conversations_packed
                + sum(self.conversations_dropped.values())
                + self.conversations_skipped
                + self.conversations_waiting,
            ),
            (
                "tokens read",
                self.tokens_read,
                self.tokens_emitted + sum(self.tokens_cut.values()) + self.tokens_dropped + self.tokens_waiting,
            ),
            ("positions", self.positions, self.positions_tokens + self.positions_padding),
        ]
        wrong = [f"{name}: {total} counted, {parts} accounted for" for name, total, parts in sums if total != parts]
        if self.targets_in_loss > self.tokens_emitted and not dealt:
            wrong.append(
                f"targets in the loss: {self.targets_in_loss}, more than the {self.tokens_emitted} tokens emitted"
            )
        return wrong

    def report(
        self,
        packed: Mapping[str, int] | None = None,
        sources: Mapping[str, Ledger] | None = None,
        notes: Notes | None = None,
        *,
        dealt: bool = False,
    ) -> LedgerReport:
        """Return the counters as nested plain data (JSON-able), with `balanced` and, if it is false, `imbalances`.

        `packed` are the sums of the packers' own counters (`packed`, `emitted`, `cropped`): they count as they pack,
        the ledger document by document, and both must agree. `sources` are the ledgers of a mixture's sources, by name.
        """
        wrong, sources = self.imbalances(dealt=dealt), sources or {}
        wrong += [f"{name}: {what}" for name, ledger in sources.items() for what in ledger.imbalances()]
        counted = {
            "packed": ("conversations_packed", self.conversations_packed),
            "emitted": ("tokens_emitted", self.tokens_emitted),
            "cropped": ("tokens_cut", self.tokens_cut["crop"]),
        }
        for name, (counter, count) in counted.items():
            if packed is not None and packed[name] != count:
                wrong.append(f"{counter}: {count} counted by document, {packed[name]} by the packing")
        own, notes = self._documents(), notes or Notes()
        report: LedgerReport = {
            "conversations": own["conversations"],
            "tokens": own["tokens"],
            "positions": {
                "total": self.positions,
                "tokens": self.positions_tokens,
                "padding": self.positions_padding,
            },
            "targets": {"in_loss": self.targets_in_loss},
            "work": self.work,
            "skipped": notes.skipped,
            "ignored_keys": notes.ignored_keys,
            "texts_with_special_tokens": notes.texts_with_special_tokens,
            "balanced": not wrong,
            "imbalances": wrong,
        }
        if sources:
            report["sources"] = {name: ledger._documents() for name, ledger in sources.items()}
        return report

    def _documents(self) -> SourceReport:
        return {
            "conversations": {
                "read": self.conversations_read,
                "packed": self.conversations_packed,
                "dropped": {reason: count for reason, count in self.conversations_dropped.items() if count},
                "skipped": self.conversations_skipped,
                "waiting": self.conversations_waiting,
                "copies": self.conversations_copies,
            },
            "tokens": {
                "read": self.tokens_read,
                "emitted": self.tokens_emitted,
                "cut": {reason: count for reason, count in self.tokens_cut.items() if count},
                "dropped": self.tokens_dropped,
                "waiting": self.tokens_waiting,
            },
        }


def report_of(shards: Iterable[Mapping[str, Any]], names: Sequence[str], *, dealt: bool = False) -> LedgerReport:
    """Return the report of the states of all shards; `names` are those of the sources of a mixture.

    With `dealt`, rows are dealt across ranks.
    """
    shards = list(shards)
    packed = {name: sum(shard["packer"][name] for shard in shards) for name in ("packed", "emitted", "cropped")}
    sources = {
        name: Ledger.total(Ledger.of(shard["sources"][number]) for shard in shards) for number, name in enumerate(names)
    }
    notes = Notes.total(Notes.of(shard.get("notes", "")) for shard in shards)
    return Ledger.total(Ledger.of(shard["ledger"]) for shard in shards).report(packed, sources, notes, dealt=dealt)
