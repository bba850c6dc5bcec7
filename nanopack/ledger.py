"""Count what happened to every conversation, token and slot, so that nothing is lost without a number.

lane.py counts as it reads and packs   ->   Ledger   ->   loader.ledger(), nanopack pack
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

DROPPED = ("untrained",)
CUT = ("max_document_tokens", "seq_len", "crop")


@dataclass
class Ledger:
    """Counters of one loader. `imbalances` holds them against each other."""

    conversations_read: int = 0
    conversations_packed: int = 0
    conversations_dropped: Counter[str] = field(default_factory=Counter)
    """By reason: `untrained`, the loss counts nothing in it."""
    conversations_skipped: int = 0
    """Bad ones, with on_error="skip"."""
    conversations_waiting: int = 0
    tokens_read: int = 0
    """Of every rendered conversation, before anything is cut."""
    tokens_emitted: int = 0
    """In batches, each counted once."""
    tokens_cut: Counter[str] = field(default_factory=Counter)
    """By reason: `max_document_tokens`, `seq_len` (longer than a row), `crop` (by best_fit_crop, to fill a row)."""
    tokens_dropped: int = 0
    """Of dropped conversations, after cutting."""
    tokens_waiting: int = 0
    slots: int = 0
    """Places in `inputs`: B * T a batch."""
    slots_tokens: int = 0
    slots_padding: int = 0
    targets_trained: int = 0

    def state(self) -> dict[str, Any]:
        """Return the counters as plain data (JSON-able), always with the same keys."""
        return {
            **{name: value for name, value in vars(self).items() if isinstance(value, int)},
            "conversations_dropped": {reason: self.conversations_dropped[reason] for reason in DROPPED},
            "tokens_cut": {reason: self.tokens_cut[reason] for reason in CUT},
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Ledger:
        """Return the ledger of that state."""
        ledger = cls()
        for name, value in state.items():
            setattr(ledger, name, Counter(value) if isinstance(value, Mapping) else value)
        return ledger

    @classmethod
    def total(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """Return the sums of all counters."""
        total = cls()
        for ledger in ledgers:
            for counter in fields(cls):
                setattr(total, counter.name, getattr(total, counter.name) + getattr(ledger, counter.name))
        return total

    def imbalances(self) -> list[str]:
        """Return what does not add up, in words; nothing in a sound ledger."""
        sums = [
            (
                "conversations read",
                self.conversations_read,
                self.conversations_packed
                + self.conversations_dropped.total()
                + self.conversations_skipped
                + self.conversations_waiting,
            ),
            (
                "tokens read",
                self.tokens_read,
                self.tokens_emitted + self.tokens_cut.total() + self.tokens_dropped + self.tokens_waiting,
            ),
            ("slots", self.slots, self.slots_tokens + self.slots_padding),
        ]
        wrong = [f"{name}: {total} counted, {parts} accounted for" for name, total, parts in sums if total != parts]
        if self.targets_trained > self.tokens_emitted:
            wrong.append(f"trained targets: {self.targets_trained}, more than the {self.tokens_emitted} tokens emitted")
        return wrong

    def report(self, sources: Mapping[str, Ledger] | None = None) -> dict[str, Any]:
        """Return the counters as nested plain data (JSON-able), with `balanced` and, if it is false, `imbalances`.

        With `sources`, the counters of each source of a mixture, which must add up to these.
        """
        wrong = self.imbalances()
        if sources:
            wrong += [f"{name}: {what}" for name, ledger in sources.items() for what in ledger.imbalances()]
            wrong += self._beside(Ledger.total(sources.values()))
        return {
            **self._read_and_packed(),
            "slots": {"total": self.slots, "tokens": self.slots_tokens, "padding": self.slots_padding},
            "targets": {"trained": self.targets_trained},
            **({"sources": {name: ledger._read_and_packed() for name, ledger in sources.items()}} if sources else {}),
            "balanced": not wrong,
            "imbalances": wrong,
        }

    def _beside(self, total: Ledger) -> list[str]:
        """Return where the sources do not add up to the whole, in words. Slots are of no source."""
        whole, parts = self.state(), total.state()
        return [
            f"{name}: {whole[name]} in all, {parts[name]} in the sources"
            for name in whole
            if name.startswith(("conversations", "tokens")) and whole[name] != parts[name]
        ]

    def _read_and_packed(self) -> dict[str, Any]:
        return {
            "conversations": {
                "read": self.conversations_read,
                "packed": self.conversations_packed,
                "dropped": dict(+self.conversations_dropped),
                "skipped": self.conversations_skipped,
                "waiting": self.conversations_waiting,
            },
            "tokens": {
                "read": self.tokens_read,
                "emitted": self.tokens_emitted,
                "cut": dict(+self.tokens_cut),
                "dropped": self.tokens_dropped,
                "waiting": self.tokens_waiting,
            },
        }
