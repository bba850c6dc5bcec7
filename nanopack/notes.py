"""Note what was left out of the conversations, and why, so that it is reported once and not a line each.

producer/shard.py notes as it reads   ->   Notes   ->   the log, at the end of a pass   and   loader.ledger()
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypedDict

# Most reasons, and most keys, that are kept apart: there may be others without end.
REASONS = KEYS = 50
OTHER, OTHER_KEYS = "other reasons", "other keys"


class Skipped(TypedDict):
    """The conversations that were skipped for one reason."""

    count: int
    example: str


@dataclass
class Notes:
    """What was left out of the conversations of a shard, or of several."""

    skipped: dict[str, Skipped] = field(default_factory=dict)
    """By reason; the first one is the example."""
    ignored_keys: dict[str, int] = field(default_factory=dict)
    """Conversations with a key that nothing reads, by its name: 'mood', 'message.mood', 'part.mood' or 'other keys'."""
    texts_with_special_tokens: int = 0
    """Plain texts that spell a special token of the tokenizer; it stays text."""

    @property
    def num_skipped(self) -> int:
        """Conversations that were skipped."""
        return sum(one["count"] for one in self.skipped.values())

    def skip(self, what: str, where: str) -> None:
        """Note a conversation that is skipped; `what` names its place, which is `where`, and what is wrong."""
        reason = reason_of(what.removeprefix(f"{where}, "))
        if reason not in self.skipped and len(self.skipped) >= REASONS:
            reason = OTHER
        one = self.skipped.setdefault(reason, {"count": 0, "example": what})
        one["count"] += 1

    def ignore(self, keys: Iterable[str]) -> None:
        """Note the keys of a conversation that nothing reads."""
        counted = set()
        for key in keys:
            name = key if key in self.ignored_keys or len(self.ignored_keys) < KEYS else OTHER_KEYS
            if name not in counted:
                self.ignored_keys[name] = self.ignored_keys.get(name, 0) + 1
            counted.add(name)

    def state(self) -> dict[str, Any]:
        """Return the notes as plain data."""
        skipped = {reason: {**one} for reason, one in self.skipped.items()}
        return {**vars(self), "skipped": skipped, "ignored_keys": {**self.ignored_keys}}

    def dump(self) -> str:
        """Return the notes as text: the keys of a state must not depend on the data."""
        return json.dumps(vars(self))

    @classmethod
    def of(cls, dumped: str) -> Notes:
        """Return the notes of a text; none where it is empty."""
        return cls(**json.loads(dumped or "{}"))

    @classmethod
    def total(cls, several: Iterable[Notes]) -> Notes:
        """Return the sums of notes."""
        total = cls()
        for notes in several:
            for reason, one in notes.skipped.items():
                mine = total.skipped.setdefault(reason, {"count": 0, "example": one["example"]})
                mine["count"] += one["count"]
            for key, count in notes.ignored_keys.items():
                total.ignored_keys[key] = total.ignored_keys.get(key, 0) + count
            total.texts_with_special_tokens += notes.texts_with_special_tokens
        return total

    def describe_skipped(self) -> str:
        """Return in one line how many were skipped, by reason with one example each, the most frequent first."""
        ordered = sorted(self.skipped.values(), key=lambda one: -one["count"])
        reasons = "; ".join(f"{one['count']} like {one['example']}" for one in ordered)
        return f"skipped {self.num_skipped} bad conversation{'s' * (self.num_skipped != 1)}: {reasons}"


def reason_of(error: str) -> str:
    """Return an error's text without numbers and quoted values, so that errors of one kind are equal.

    >>> reason_of("message 12: role is 'judge'; allowed are assistant, user")
    'message N: role is ...; allowed are assistant, user'
    """
    without_values = re.sub(r"(?<![\w=])(['\"])(?:\\.|(?!\1).)*\1", "...", error)
    return re.sub(r"\d[\d,.]*", "N", without_values)[:160]
