"""Compare the loader's batches with the reference's, and name the first difference.

Loader and reference.batches on the same arguments   ->   verify()   ->   Verification
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from nanopack import reference, witness
from nanopack.batch import Batch
from nanopack.checks import check_int
from nanopack.config import LoaderConfig
from nanopack.conversations.records import check
from nanopack.loader import Loader
from nanopack.render.renderer import Renderer
from nanopack.witness import Testimony

DATA_ARGUMENTS = {field.name for field in fields(LoaderConfig)}


@dataclass(frozen=True)
class Verification:
    """Result of a comparison; true when there are batches, and all are equal in every field."""

    batches: int
    """Batches that were compared and equal."""
    tokens: int
    """Tokens in them, without padding."""
    difference: str | None
    """The first difference: batch, field, position, expected and got; None if there is none."""

    def __bool__(self) -> bool:
        return self.difference is None and self.batches > 0


# The arguments are the Loader's own: writing out its names a third time would only let them drift apart.
def verify(
    conversations: Any,
    tokenizer: Any,
    *,
    max_batches: int | None = None,
    against: str | None = None,
    **arguments: Any,
) -> Verification | Testimony:
    """Compare the batches of `Loader(conversations, tokenizer, **arguments)` with those of `reference.batches`.

    Args:
        conversations, tokenizer, arguments: as of `Loader`, but `epochs` is 1 unless given.
        max_batches: stop after this many batches; required with epochs=None, where the data are endless.
        against: compare instead each conversation, before it is packed, with what another library has in the loss:
            "trl" or "transformers" (with template="hf"), or "axolotl-like"; see `nanopack.witness`.

    Raises:
        ValueError: as `Loader` does.
        ConversationError: for a bad conversation, unless on_error="skip".
    """
    if against is not None:
        if max_batches is not None:
            raise ValueError(f"max_batches={max_batches} has no meaning with against={against!r}; leave it out")
        with Loader(conversations, tokenizer, **{**arguments, "num_workers": 0}) as loader:
            return compare_with_witness(loader, against)
    if max_batches is not None:
        check_int("max_batches", max_batches, least=1, or_none=True)
    arguments.setdefault("epochs", 1)
    if arguments["epochs"] is None and max_batches is None:
        raise ValueError("epochs=None is endless; pass max_batches, or a number of epochs")
    with Loader(conversations, tokenizer, **arguments) as loader:
        expected = expected_batches(loader, conversations, arguments)
        return compare(itertools.islice(expected, max_batches), itertools.islice(loader, max_batches))


def expected_batches(loader: Loader, conversations: Any, arguments: Mapping[str, Any]) -> Iterator[Batch]:
    """Return the reference's batches for a loader of these conversations and arguments."""
    deciding = {name: value for name, value in arguments.items() if name in DATA_ARGUMENTS}
    # where they were not given, torch.distributed knows them
    deciding |= {"rank": loader.config.rank, "world_size": loader.config.world_size}
    return reference.batches(conversations, loader.tokenizer, **deciding)


def compare_with_witness(loader: Loader, against: str) -> Testimony:
    """Compare what is in the loss of each conversation of a loader with what a witness has in it."""
    config, source, tokenizer = loader.config, loader.source, loader.tokenizer
    if against != "axolotl-like" and config.template not in ("hf", "hf-training"):
        raise ValueError(f"against={against!r} compares chat templates; pass template='hf'")
    if config.loss == "all":
        raise ValueError(
            f"against={against!r} compares the answers, and loss='all' puts every token in it; leave it out"
        )
    render = Renderer(tokenizer, config.template, config.loss, config.first_assistant)

    def ours(record: object) -> witness.Tokens:
        document = render(check(record))
        return list(zip(document.ids.tolist(), document.mask.tolist(), strict=True))

    records = ((source.where(index), source[index]) for index in range(len(source)))
    return witness.compare(records, ours, getattr(tokenizer, "chat", None), against)


def compare(expected: Iterator[Batch], got: Iterator[Batch]) -> Verification:
    """Compare two sequences of batches, field by field, to the end."""
    batches = tokens = 0
    # the loader first: its error for a bad conversation says more than the reference's
    for b, a in itertools.zip_longest(got, expected):
        if a is None or b is None:
            more, fewer = ("reference", "loader") if b is None else ("loader", "reference")
            return Verification(batches, tokens, f"the {fewer} ends after {batches} batches, the {more} continues")
        if (difference := first_difference(a, b)) is not None:
            return Verification(batches, tokens, f"batch {batches}, {difference}")
        batches += 1
        tokens += a.num_tokens
    return Verification(batches, tokens, None)


def first_difference(expected: Batch, got: Batch) -> str | None:
    """Return the first field and position in which two batches differ, None if they are equal in every bit."""
    for field in fields(Batch):
        a, b = getattr(expected, field.name), getattr(got, field.name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            difference = _tensor_difference(a, b.cpu())
        else:
            same_kind = type(a) is type(b) or field.name == "word_pieces"
            difference = None if same_kind and a == b else f": expected {a!r}, got {b!r}"
        if difference is not None:
            return f"{field.name}{difference}"
    return None


def _tensor_difference(expected: torch.Tensor, got: torch.Tensor) -> str | None:
    if (expected.shape, expected.dtype) != (got.shape, got.dtype):
        return f": expected {tuple(expected.shape)} {expected.dtype}, got {tuple(got.shape)} {got.dtype}"
    if torch.equal(expected, got):
        return None
    position = tuple((expected != got).nonzero()[0].tolist())
    return f"{list(position)}: expected {expected[position].item()}, got {got[position].item()}"
