"""Say which batches are asked for: every choice that decides which token lands where.

    Loader(**arguments)   ->   LoaderConfig, checked and complete   ->   producer.py, ring.py, verify.py

One place for names, defaults and limits, so that each wrong argument is refused at construction with the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from nanopack.packing.packers import MAX_AGE, PACKINGS, WINDOWS
from nanopack.render.templates import Template

LOSSES = ("assistant", "last", "all")
FIRST_ASSISTANT = ("keep", "raise", "drop", "empty_user")
LOSS_WEIGHTS = (None, "token", "conversation")
EXTRAS = ("positions", "doc_ids", "cu_seqlens")
TEMPLATES = ("nanochat", "chatml", "llama3", "hf")
ON_ERROR = ("raise", "skip")
SHARDS = ("rank", "row")

# A column of a batch is an int32 in cu_seqlens.
MAX_SLOTS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """The arguments of a loader, checked, with the defaults of its packing filled in: `Loader` says what each means."""

    batch_size: int = 32
    seq_len: int = 2048
    packing: str = "best_fit"
    loss: str = "assistant"
    loss_weights: str | None = None
    extras: Sequence[str] = ()
    max_pieces: int | None = None
    template: str | Template = "nanochat"
    first_assistant: str = "keep"
    max_document_tokens: int | None = None
    window: int | None = None
    max_age: int | None = None
    refill: int = 1
    overlap: bool = False
    boundary_loss: bool = True
    ignore_index: int = -100
    rank: int = 0
    world_size: int = 1
    shard: str = "rank"
    seed: int | None = None
    epochs: int | None = None
    on_error: str = "raise"

    def __post_init__(self) -> None:
        """Raise ValueError for the first argument that cannot be, and fill in what the packing decides."""
        for name in ("packing", "loss", "loss_weights", "template", "first_assistant", "shard", "on_error"):
            _check_choice(name, getattr(self, name))
        for name in ("overlap", "boundary_loss"):
            check_bool(name, getattr(self, name))
        for name in ("batch_size", "seq_len", "refill", "world_size"):
            check_int(name, getattr(self, name), least=1)
        for name in ("max_document_tokens", "window", "max_age", "epochs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least=1, or_none=True)
        if self.max_pieces is not None:
            why = f" with seq_len={self.seq_len}"
            check_int("max_pieces", self.max_pieces, least=1, most=self.seq_len, or_none=True, why=why)
        check_int("ignore_index", self.ignore_index, least=-(2**63), most=2**63 - 1)
        if self.seed is not None:
            check_int("seed", self.seed, least=0, most=2**64 - 1, or_none=True)
        check_int("rank", self.rank, least=0, most=self.world_size - 1, why=f" with world_size={self.world_size}")
        if self.batch_size * self.seq_len > MAX_SLOTS:
            raise ValueError(
                f"batch_size={self.batch_size} times seq_len={self.seq_len} is {self.batch_size * self.seq_len} tokens "
                f"a batch; at most {MAX_SLOTS} are allowed"
            )
        object.__setattr__(self, "extras", _checked_extras(self.extras))
        self._check_packing_arguments()
        for name, default in self._defaults():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    def _check_packing_arguments(self) -> None:
        belongs = {
            "window": (self.window is not None, tuple(WINDOWS)),
            "max_age": (self.max_age is not None, ("best_fit",)),
            "refill": (self.refill != 1, tuple(WINDOWS)),
            "overlap": (self.overlap, ("stream",)),
        }
        for name, (given, packings) in belongs.items():
            if given and self.packing not in packings:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning with packing={self.packing!r}; "
                    f"leave it out, or use packing={' or '.join(map(repr, packings))}"
                )
        if self.max_pieces is not None and "cu_seqlens" not in self.extras:
            raise ValueError(
                f"max_pieces={self.max_pieces} has no meaning without cu_seqlens; "
                f'leave it out, or add "cu_seqlens" to extras'
            )

    def _defaults(self) -> list[tuple[str, int | None]]:
        return [
            ("window", WINDOWS.get(self.packing)),
            ("max_age", MAX_AGE if self.packing == "best_fit" else None),
            ("max_pieces", self.seq_len // 8 + 1),
        ]

    @property
    def template_name(self) -> str:
        """What messages call the template."""
        return self.template if isinstance(self.template, str) else self.template.name

    @property
    def global_rows(self) -> int:
        """Rows of all ranks' batches together."""
        return self.batch_size * self.world_size

    @property
    def lanes(self) -> range:
        """The lanes of this rank, and how all ranks together number them: one a rank, or one a row."""
        if self.shard == "rank":
            return range(self.rank, self.rank + 1)
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    @property
    def all_lanes(self) -> range:
        """The lanes of all ranks."""
        return range(self.world_size if self.shard == "rank" else self.global_rows)

    @property
    def lane_rows(self) -> int:
        """Rows that a lane gives a batch."""
        return self.batch_size if self.shard == "rank" else 1

    @property
    def row_tokens(self) -> int:
        """Most tokens in a row: T inputs, and the last target."""
        return self.seq_len + 1

    @property
    def cuts_to_row(self) -> bool:
        """Whether a document is cut to a row before it waits."""
        return self.packing in ("best_fit", "best_fit_pad", "pad")

    @cached_property
    def limits(self) -> list[tuple[str, int]]:
        """Tokens to which a document is cut before it waits, each with the reason, in order."""
        limits = [
            ("max_document_tokens", self.max_document_tokens),
            ("seq_len", self.row_tokens if self.cuts_to_row else None),
        ]
        return [(reason, limit) for reason, limit in limits if limit is not None]

    @property
    def drops_untrained(self) -> bool:
        """Whether a document in which nothing is trained is dropped."""
        return self.loss != "all" and self.packing in ("best_fit", "pad")


def _check_choice(name: str, value: object) -> None:
    allowed: tuple[object, ...] = {
        "packing": PACKINGS,
        "loss": LOSSES,
        "loss_weights": LOSS_WEIGHTS,
        "template": TEMPLATES,
        "first_assistant": FIRST_ASSISTANT,
        "shard": SHARDS,
        "on_error": ON_ERROR,
    }[name]
    if name == "template" and isinstance(value, Template):
        return
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        or_own = ", or a nanopack.Template" if name == "template" else ""
        raise ValueError(f"{name}={value!r} is not allowed; use one of {', '.join(map(repr, allowed))}{or_own}")


def check_bool(name: str, value: object) -> None:
    """Raise ValueError unless the argument is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not allowed; use True or False")


def check_int(
    name: str, value: object, *, least: int, most: int | None = None, or_none: bool = False, why: str = ""
) -> None:
    """Raise ValueError unless the argument is an int within these bounds."""
    # bool is an int in Python; batch_size=True is a mistake all the same
    if isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most):
        return
    upper = f" to {most}" if most is not None else " upwards"
    raise ValueError(
        f"{name}={value!r} is not allowed{why}; use an int from {least}{upper}{', or None' if or_none else ''}"
    )


def _checked_extras(extras: object) -> tuple[str, ...]:
    allowed = ", ".join(map(repr, EXTRAS))
    # a lone string would be read as its letters
    if isinstance(extras, str) or not isinstance(extras, (Sequence, set, frozenset)):
        raise ValueError(f"extras={extras!r} is not allowed; use a tuple of any of {allowed}")
    for extra in extras:
        if extra not in EXTRAS:
            raise ValueError(f"extras={extras!r}: {extra!r} is not known; use any of {allowed}")
    return tuple(extra for extra in EXTRAS if extra in extras)
