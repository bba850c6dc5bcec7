"""Define which batches are asked for: every choice that decides which token lands where.

    Loader(**arguments)   ->   LoaderConfig, checked and complete   ->   producer/, ring/, upload/, state.py

The only place for names, defaults and limits, so that a wrong argument is refused at construction, in the same words
everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias, get_args

from nanopack.checks import check_bool, check_choice, check_int
from nanopack.packing.cost import Cost
from nanopack.packing.packings import BestFit, Packing
from nanopack.render.templates import Template

Loss: TypeAlias = Literal["assistant", "last", "all"]
Turns: TypeAlias = Literal["all", "each"]
FirstAssistant: TypeAlias = Literal["keep", "raise", "drop", "empty_user"]
LossWeights: TypeAlias = Literal["token", "conversation"]
Extra: TypeAlias = Literal["positions", "doc_ids", "cu_seqlens", "cu_seqlens_real"]
TemplateName: TypeAlias = Literal["nanochat", "chatml", "llama3", "hf", "hf-training"]
OnError: TypeAlias = Literal["raise", "skip"]
ShardBy: TypeAlias = Literal["rank", "row"]
Executor: TypeAlias = Literal["torch", "triton"]
Encoder: TypeAlias = Literal["fast"]

LOSSES = get_args(Loss)
TURNS = get_args(Turns)
FIRST_ASSISTANTS = get_args(FirstAssistant)
LOSS_WEIGHTS = (None, *get_args(LossWeights))
EXTRAS: tuple[Extra, ...] = get_args(Extra)
TEMPLATES = get_args(TemplateName)
ON_ERROR = get_args(OnError)
SHARDS = get_args(ShardBy)

BALANCE_WINDOW = 8

# A column of a flattened batch is an int32 in cu_seqlens.
MAX_POSITIONS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """The arguments of a loader that decide its batches, checked and with their defaults; `Loader` explains each."""

    batch_size: int = 32
    seq_len: int = 2048
    packing: Packing = field(default_factory=BestFit)
    template: TemplateName | Template = "nanochat"
    first_assistant: FirstAssistant = "keep"
    turns: Turns = "all"
    loss: Loss = "assistant"
    loss_weights: LossWeights | None = None
    boundary_loss: bool = True
    ignore_index: int = -100
    max_document_tokens: int | None = None
    extras: Collection[Extra] = ()
    max_pieces: int | None = None
    seed: int | None = None
    epochs: int | None = None
    rank: int = 0
    world_size: int = 1
    shard: ShardBy = "rank"
    document_align: int = 1
    balance: Cost | None = None
    balance_window: int | None = None
    balance_across: bool = False
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        """Raise ValueError for the first invalid argument; put `extras` in order and complete `max_pieces`."""
        self._check_choices()
        self._check_numbers()
        object.__setattr__(self, "extras", _checked_extras(self.extras))
        if self.max_pieces is None:
            object.__setattr__(self, "max_pieces", self.seq_len // 8 + 1)
        elif "cu_seqlens" not in self.extras:
            raise ValueError(
                f"max_pieces={self.max_pieces} has no meaning without cu_seqlens; "
                f'leave it out, or add "cu_seqlens" to extras'
            )

        self._check_align()
        self._check_balance()

    def _check_align(self) -> None:
        """Raise ValueError where documents cannot take multiples of `document_align` tokens."""
        check_int("document_align", self.document_align, least=1)
        if self.document_align == 1:
            return
        self._refuse_whole_passes("document_align")
        if self.packing.splits or self.packing.crops:
            raise ValueError(
                f"document_align={self.document_align} has no meaning with packing={self.packing.name!r}, which does "
                f"not keep documents whole; leave it out, or use packing='best_fit'"
            )
        if self.seq_len % self.document_align:
            raise ValueError(
                f"document_align={self.document_align} does not divide seq_len={self.seq_len}; use a seq_len that is a "
                f"multiple of it"
            )

    def _check_balance(self) -> None:
        """Complete `balance_window`; raise ValueError where it, or the packing, does not fit."""
        check_int("balance_window", self.balance_window, least=1, or_none=True)
        check_bool("balance_across", self.balance_across)
        if self.balance is None:
            if self.balance_across:
                raise ValueError("balance_across=True has no meaning without balance; leave it out, or pass balance")
            if self.balance_window is not None:
                raise ValueError(
                    f"balance_window={self.balance_window} has no meaning without balance; leave it out, or pass "
                    f"balance, such as the config of the model"
                )
            return
        self._refuse_whole_passes("balance")
        if self.packing.splits:
            raise ValueError(
                f"balance has no meaning with packing={self.packing.name!r}, whose documents continue in the next row; "
                f"leave it out, or use packing='best_fit'"
            )
        object.__setattr__(self, "balance_window", self.balance_window or BALANCE_WINDOW)

    def _refuse_whole_passes(self, name: str) -> None:
        if self.packing.whole_passes:
            raise ValueError(
                f"{name} and packing={self.packing!r} do not go together: leave one out, or use a window of documents, "
                f"such as nanopack.BestFit(window=4096)"
            )

    def _check_choices(self) -> None:
        check_choice("loss", self.loss, LOSSES)
        check_choice("loss_weights", self.loss_weights, LOSS_WEIGHTS)
        if not isinstance(self.template, Template):
            check_choice("template", self.template, TEMPLATES, otherwise=", or a nanopack.Template")
        check_choice("first_assistant", self.first_assistant, FIRST_ASSISTANTS)
        check_choice("turns", self.turns, TURNS)
        if self.turns == "each" and self.loss != "assistant":
            raise ValueError(
                f"loss={self.loss!r} has no meaning with turns='each', where every document has one answer in the "
                f"loss; leave it out, or use turns='all'"
            )
        check_choice("shard", self.shard, SHARDS)
        check_choice("on_error", self.on_error, ON_ERROR)
        check_bool("boundary_loss", self.boundary_loss)

    def _check_numbers(self) -> None:
        for name in ("batch_size", "seq_len", "world_size"):
            check_int(name, getattr(self, name), least=1)
        for name in ("max_document_tokens", "epochs"):
            check_int(name, getattr(self, name), least=1, or_none=True)
        why = f" with seq_len={self.seq_len}"
        check_int("max_pieces", self.max_pieces, least=1, most=self.seq_len, or_none=True, why=why)
        check_int("ignore_index", self.ignore_index, least=-(2**63), most=2**63 - 1)
        check_int("seed", self.seed, least=0, most=2**64 - 1, or_none=True)
        check_int("rank", self.rank, least=0, most=self.world_size - 1, why=f" with world_size={self.world_size}")
        if self.batch_size * self.seq_len > MAX_POSITIONS:
            raise ValueError(
                f"batch_size={self.batch_size} times seq_len={self.seq_len} is {self.batch_size * self.seq_len} tokens "
                f"per batch; at most {MAX_POSITIONS} are allowed"
            )

    @property
    def template_name(self) -> str:
        """The template's name, for messages."""
        return self.template if isinstance(self.template, str) else self.template.name

    @property
    def global_rows(self) -> int:
        """Rows in the batches of all ranks together."""
        return self.batch_size * self.world_size

    @property
    def shards(self) -> range:
        """Numbers of this rank's shards among those of all ranks: one a rank, or with shard="row" one a row."""
        if self.shard == "rank":
            return range(self.rank, self.rank + 1)
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    @property
    def all_shards(self) -> range:
        """Numbers of the shards of all ranks."""
        return range(self.world_size if self.shard == "rank" else self.global_rows)

    @property
    def shard_rows(self) -> int:
        """Rows that a shard contributes to a batch."""
        return self.batch_size if self.shard == "rank" else 1

    @property
    def row_tokens(self) -> int:
        """Most tokens in a row: T inputs and the last target."""
        return self.seq_len + 1

    @cached_property
    def limits(self) -> list[tuple[str, int]]:
        """Tokens to which a document is cut before it waits, each after the reason for it, in order."""
        row = self.row_tokens if self.packing.cuts_to_row else None
        limits = [("max_document_tokens", self.max_document_tokens), ("seq_len", row)]
        return [(reason, limit) for reason, limit in limits if limit is not None]

    @property
    def drops_untrained(self) -> bool:
        """Whether a document without any token in the loss is dropped."""
        return self.packing.drops_untrained(self.loss)


def _checked_extras(extras: object) -> tuple[Extra, ...]:
    allowed = ", ".join(map(repr, EXTRAS))
    # a lone string would be read as its letters
    if isinstance(extras, str) or not isinstance(extras, (Sequence, Set)):
        raise ValueError(f"extras={extras!r} is not allowed; use a tuple of any of {allowed}")
    for extra in extras:
        if extra not in EXTRAS:
            raise ValueError(f"extras={extras!r}: {extra!r} is not known; use any of {allowed}")
    # the real lengths are of the segments that cu_seqlens list
    wanted = {*extras, *(["cu_seqlens"] if "cu_seqlens_real" in extras else [])}
    return tuple(extra for extra in EXTRAS if extra in wanted)
