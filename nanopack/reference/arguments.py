"""The slow packer's arguments: their choices, defaults and limits, checked.

A part of the definition. It shares nothing with the fast path but what a template is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from nanopack.render.templates import Template

# The packings, with their options; window, max_age and refill count documents, rows and documents.
DEFAULTS: dict[str, dict[str, Any]] = {
    "best_fit": {"window": 64, "max_age": 128, "refill": 1},
    "stream": {"overlap": False},
    "best_fit_pad": {"window": 100, "refill": 1},
    "best_fit_crop": {"window": 1000, "refill": 1},
    "pad": {},
}
CHOICES: dict[str, tuple[str | None, ...]] = {
    "packing": tuple(DEFAULTS),
    "loss": ("assistant", "last", "all"),
    "loss_weights": (None, "token", "conversation"),
    "extras": ("positions", "doc_ids", "cu_seqlens", "cu_seqlens_real"),
    "template": ("nanochat", "chatml", "llama3", "hf", "hf-training"),
    "first_assistant": ("keep", "raise", "drop", "empty_user"),
    "turns": ("all", "each"),
    "shard": ("rank", "row"),
    "on_error": ("raise", "skip"),
}


class PackingOptions(Protocol):
    """A packing object, such as `nanopack.BestFit(window=8)`: its options are its attributes."""

    @property
    def name(self) -> str:
        """The name that stands for it with its default options."""


def packing_and_options(packing: str | PackingOptions) -> tuple[str, dict[str, Any]]:
    """Return name and options of a packing; no other code of a packing object is used."""
    if isinstance(packing, str):
        return packing, DEFAULTS.get(packing, {})
    return packing.name, {option: getattr(packing, option) for option in DEFAULTS[packing.name]}


def check_choices(extras: Collection[str], **chosen: object) -> None:
    """Raise ValueError for a value that is none of its argument's choices."""
    for name, value in [*chosen.items(), *(("extras", extra) for extra in extras)]:
        if value not in CHOICES[name] and not isinstance(value, Template):
            raise ValueError(f"{name}={value!r} is not known. Pass one of {CHOICES[name]}.")


def check_counts(*, or_none: bool = False, **counts: int | None) -> None:
    """Raise ValueError for a count that is not an int from 1, or with `or_none` None."""
    for name, count in counts.items():
        if not (or_none and count is None) and (type(count) is not int or count < 1):
            raise ValueError(f"{name}={count!r} is impossible. Pass an int from 1.")


def check_ranges(rank: int, world_size: int, seed: int | None, max_pieces: int | None, seq_len: int) -> None:
    """Raise ValueError for a number outside the range that others give it."""
    if type(rank) is not int or not 0 <= rank < world_size:
        raise ValueError(
            f"rank={rank!r} of world_size={world_size} is impossible. Pass an int from 0, below world_size."
        )
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
        raise ValueError(f"seed={seed!r} is impossible. Pass an int from 0, below 2**64, or None.")
    if max_pieces is not None and max_pieces > seq_len:
        raise ValueError(f"max_pieces={max_pieces} is more than seq_len={seq_len}. Pass at most that.")
