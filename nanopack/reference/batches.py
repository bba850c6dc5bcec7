"""The slow packer in plain Python lists: the definition of a batch.

    conversations, tokenizer, arguments   ->   batches()   ->   the batches that a Loader must give, bit for bit
                                                                verify.py compares them

Read it the way the data travel: documents.py makes the documents, order.py decides in which order they are read,
packing.py makes rows of them, this file makes batches of the rows. Written to be right, not fast: choices are scans
over lists, tensors appear in the last lines. It shares nothing with the fast path but the tokenizing of one string, the
`Batch` class and the names of errors, so that no mistake can hide in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch

from nanopack.batch import Batch, Piece
from nanopack.errors import ConversationError
from nanopack.reference.arguments import (
    PackingOptions,
    check_choices,
    check_counts,
    check_ranges,
    packing_and_options,
)
from nanopack.reference.balance import across_ranks, balanced, cost_of, cost_of_documents
from nanopack.reference.documents import chat_of, check_ids, render
from nanopack.reference.files import open_records
from nanopack.reference.messages import choose
from nanopack.reference.order import Reader
from nanopack.reference.packing import TAIL, Document, Rows, Word, pack_passes, pack_rows, pack_stream
from nanopack.reference.records import Record, conversation
from nanopack.reference.turns import Readable, each_answer
from nanopack.render.templates import Template
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.tokenizer import for_template, load_tokenizer

SPECIAL_TOKENS = {
    "nanochat": [
        *("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
        *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
    ],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "hf": [],
    "hf-training": [],
}


def batches(
    conversations: Any,
    tokenizer: Any,
    *,
    batch_size: int = 32,
    seq_len: int = 2048,
    packing: str | PackingOptions = "best_fit",
    template: str | Template = "nanochat",
    first_assistant: str = "keep",
    turns: str = "all",
    loss: str = "assistant",
    loss_weights: str | None = None,
    boundary_loss: bool = True,
    ignore_index: int = -100,
    max_document_tokens: int | None = None,
    extras: Collection[str] = (),
    max_pieces: int | None = None,
    seed: int | None = None,
    epochs: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    shard: str = "rank",
    document_align: int = 1,
    balance: Any = None,
    balance_window: int | None = None,
    balance_across: bool = False,
    on_error: str = "raise",
) -> Iterator[Batch]:
    """Return the batches of one rank, on the CPU; endless where `epochs` is None. Arguments as of `Loader`.

    Raises ValueError for an unknown choice, an impossible number, or messages for which the tokenizer lacks special
    tokens, and ConversationError for an invalid conversation.
    """
    packing, options = packing_and_options(packing)
    chosen = dict(packing=packing, loss=loss, loss_weights=loss_weights, template=template, shard=shard)
    check_choices(extras, **chosen, first_assistant=first_assistant, turns=turns, on_error=on_error)
    if turns == "each" and loss != "assistant":
        raise ValueError(f"loss={loss!r} and turns='each' contradict each other. Leave one out.")
    check_counts(batch_size=batch_size, seq_len=seq_len, world_size=world_size, document_align=document_align)
    if document_align > 1 and (packing in ("stream", "best_fit_crop") or seq_len % document_align):
        raise ValueError(
            f"document_align={document_align} needs documents that are kept whole, and a seq_len that it divides. "
            f"Pass another packing than {packing!r}, or another seq_len than {seq_len}."
        )
    check_counts(or_none=True, max_pieces=max_pieces, max_document_tokens=max_document_tokens, epochs=epochs)
    check_counts(or_none=True, balance_window=balance_window)
    if balance_window is not None and balance is None:
        raise ValueError(f"balance_window={balance_window} needs balance. Leave it out, or pass balance.")
    if options.get("window") == "all" and (document_align > 1 or balance is not None):
        raise ValueError("window='all' knows neither document_align nor balance. Leave one out.")
    if balance_across and balance is None:
        raise ValueError("balance_across=True needs balance. Leave it out, or pass balance.")
    if balance is not None and packing == "stream":
        raise ValueError("balance moves rows of whole documents, and packing='stream' splits them. Leave one out.")
    if "cu_seqlens_real" in extras:
        # They are of the pieces that cu_seqlens list.
        extras = {*extras, "cu_seqlens"}
    check_ranges(rank, world_size, seed, max_pieces, seq_len)
    coder = for_template(load_tokenizer(tokenizer), template)
    needed = template.special_tokens if isinstance(template, Template) else SPECIAL_TOKENS[template]
    if isinstance(coder, HuggingFaceTokenizer):
        # What looks like one of the template's tokens is text in a message.
        by_own = template in ("hf", "hf-training") and coder.chat
        coder = coder.with_special(chat_of(coder).writer.control if by_own else needed)
    lacking = [token for token in needed if token not in coder.special_tokens]
    stored = open_records(conversations, seed)
    records: list[Readable] = [(where, partial(_said, record, loss, first_assistant)) for where, record in stored]
    if turns == "each":
        records = each_answer(records)
    cut = seq_len + 1 if packing in ("best_fit", "best_fit_pad", "pad") else None
    # nanochat's packings keep a document without a token in the loss, and so must we to reproduce its batches.
    drops = packing in ("best_fit", "pad") and loss != "all"

    def read(index: int) -> Document | Literal["skipped"] | None:
        where, record = records[index]
        try:
            said = record()
            if said.tokens is not None:
                tokens = check_ids(said.tokens, coder.vocab_size)
            else:
                # Asked here, so that a tokenizer that lacks one is not taken for many bad conversations.
                tokens = [] if said.messages and lacking else render(said, coder, template)
        except (MemoryError, OSError, EOFError):
            # What cannot be read is no bad conversation.
            raise
        except Exception as error:
            if on_error == "skip":
                return "skipped"
            raise ConversationError(f'{where}, {error}. Fix it or pass on_error="skip".') from error
        if not tokens:
            raise ValueError(f"{where}: template={template!r} needs tokens that the tokenizer lacks: {lacking}.")
        tokens = tokens[:max_document_tokens][:cut]
        if said.weight == 0:
            tokens = [(id, False) for id, _ in tokens]
        if loss == "all":
            tokens = [(id, True) for id, _ in tokens]
        if not boundary_loss:
            tokens[0] = (tokens[0][0], False)
        document = Document(index, tokens, said.weight)
        return None if drops and document.num_loss_tokens == 0 else document

    # Each shard of the conversations is packed by itself: one per rank, or one per row of the global batch.
    by_row = shard == "row"
    num_shards, shard_rows = (batch_size * world_size, 1) if by_row else (world_size, batch_size)
    own = range(rank * batch_size, (rank + 1) * batch_size) if by_row else [rank]

    def pack_shard(number: int) -> PackedShard:
        reader = Reader(len(records), read, number, num_shards, epochs, seed)
        if packing == "stream":
            return PackedShard(reader, pack_stream(reader, shard_rows, seq_len, bool(options["overlap"])))
        if options.get("window") == "all":
            return PackedShard(reader, pack_passes(reader, shard_rows, seq_len))
        # One document a row is the choice among one.
        window, refill, max_age = options.get("window", 1), options.get("refill", 1), options.get("max_age", math.inf)
        packed = pack_rows(reader, packing, shard_rows, seq_len, window, refill, max_age, document_align)
        if cost is not None and not balance_across:
            packed = balanced(packed, cost, balance_window or 8, seed)
        return PackedShard(reader, packed)

    cost = None if balance is None else cost_of_documents(balance)

    def longest() -> int:
        """The number of batches of the longest shard of all ranks."""
        return max(sum(1 for _ in pack_shard(number).packed) for number in range(num_shards)) if world_size > 1 else 0

    build = partial(_batch, packing, seq_len, loss_weights, extras, max_pieces, coder.bos_id, ignore_index, cost)
    # Lazy: each batch is built, with the progress of its readers, before the next one is packed.
    if cost is not None and balance_across:
        shards = [pack_shard(number) for number in range(num_shards)]
        rows_across = across_ranks(
            [one.packed for one in shards], cost, balance_window or 8, seed, batch_size, world_size, rank
        )
        packed = _with_shards(rows_across, shards)
    else:
        packed = _side_by_side([pack_shard(number) for number in own], shard_rows, longest)
    return (build(step, rows, shards) for step, (rows, shards) in enumerate(packed))


def _said(record: Callable[[], object], loss: str, first_assistant: str) -> Record:
    said = conversation(record())
    said.messages = choose(said.messages, loss, first_assistant)
    return said


@dataclass
class PackedShard:
    """A shard of the conversations as it is packed."""

    reader: Reader[Document]
    packed: Iterator[tuple[Rows, int]]
    """Its rows of each batch, and how many conversations have been placed (by the stream: read) then."""
    placed: int = 0

    def progress(self, streams: bool) -> tuple[float, bool]:
        """Return the fraction of the data consumed, and whether that is all of it."""
        # By rows, a conversation is consumed when it is placed, dropped or skipped.
        return self.reader.progress(streams, self.reader.reads if streams else self.placed + self.reader.left_out)


def _side_by_side(
    shards: list[PackedShard], shard_rows: int, longest: Callable[[], int]
) -> Iterator[tuple[Rows, list[PackedShard]]]:
    """Yield the rows of all these shards, batch by batch, until the longest shard of all ranks is done."""
    batches = 0
    while True:
        rows: Rows = []
        ended = True
        for shard in shards:
            packed = next(shard.packed, None)
            if packed is None:
                rows += [[]] * shard_rows
            else:
                shard.placed = packed[1]
                rows += packed[0]
                ended = False
        # All ranks must give equally many batches: a rank that is done gives padding.
        if ended and batches >= longest():
            return
        yield rows, shards
        batches += 1


def _with_shards(
    dealt: Iterator[tuple[Rows, list[int]]], shards: list[PackedShard]
) -> Iterator[tuple[Rows, list[PackedShard]]]:
    """Yield the rows of each batch, with the shards of all ranks as they are then."""
    for rows, placed in dealt:
        for shard, own in zip(shards, placed, strict=True):
            shard.placed = own
        yield rows, shards


# The batch: lists first, tensors at the very end.


def _batch(
    packing: str, seq_len: int, loss_weights: str | None, extras: Collection[str],
    max_pieces: int | None,
    bos_id: int, ignore_index: int, cost: tuple[float, float] | None,
    step: int, rows: Rows, shards: list[PackedShard],
) -> Batch:  # fmt: skip
    inputs, targets, target_weights, positions, doc_ids, starts = [], [], [], [], [], []
    num_loss_tokens = num_tokens = 0
    padding = Document(-1, [(bos_id, False)] * (seq_len + 1), 0.0)
    # The real length of each piece in the inputs, tails left out; padding has none.
    real: list[int] = []
    for number, row in enumerate(rows):
        # From here on padding is one more document, at the end of the row, different only in its doc_id.
        words = [*row, *padding.words()[len(row) :]]
        pieces = _pieces(words)
        inputs.append([bos_id if word.id == TAIL else word.id for word in words[:-1]])
        # What follows a tail is no target: the tail is padding.
        wanted = [word.in_loss and before.id != TAIL for before, word in pairwise(words)]
        targets.append([word.id if one else ignore_index for word, one in zip(words[1:], wanted, strict=True)])
        weighed_words = zip(words[1:], wanted, strict=True)
        target_weights.append([word.document.weigh(loss_weights) if one else 0.0 for word, one in weighed_words])
        num_loss_tokens += sum(wanted)
        num_tokens += sum(word.id != TAIL for word in row[:seq_len])
        counted = [(n, i) for n, piece in enumerate(pieces) for i in range(piece.length)][:seq_len]
        positions.append([i for _, i in counted])
        doc_ids.append([-1 if pieces[n].conversation == -1 else n for n, _ in counted])
        own = [_without_tail(piece, words) for piece in pieces if piece.start < seq_len]
        real += [min(p.length, seq_len - p.start) if p.conversation != -1 else 0 for p in own]
        starts += [number * seq_len + piece.start for piece in pieces if piece.start < seq_len]
    starts.append(len(rows) * seq_len)
    max_seqlen = max(starts[i + 1] - starts[i] for i in range(len(starts) - 1))
    real = [*accumulate(real, initial=0)]
    if "cu_seqlens" in extras:
        room = seq_len // 8 + 1 if max_pieces is None else max_pieces
        starts, real = (_filled(ends, step, len(rows), room) for ends in (starts, real))
    # Each weight is rounded to float32 once; their sum has no error of its own.
    weighed = torch.tensor(target_weights, dtype=torch.float32)
    progress, last = zip(*(shard.progress(packing == "stream") for shard in shards), strict=True)
    return Batch(
        inputs=torch.tensor(inputs, dtype=torch.int32),
        targets=torch.tensor(targets, dtype=torch.int64),
        weights=None if loss_weights is None else weighed,
        positions=torch.tensor(positions, dtype=torch.int32) if "positions" in extras else None,
        doc_ids=torch.tensor(doc_ids, dtype=torch.int32) if "doc_ids" in extras else None,
        cu_seqlens=torch.tensor(starts, dtype=torch.int32) if "cu_seqlens" in extras else None,
        step=step,
        num_loss_tokens=num_loss_tokens,
        num_tokens=num_tokens,
        weight_sum=math.fsum(weighed.flatten().tolist()),
        max_seqlen=max_seqlen,
        # The end of the last pass does not begin another.
        epoch=max(shard.reader.epoch_reached for shard in shards),
        progress=math.fsum(progress) / len(shards),
        last=all(last),
        word_pieces=tuple(tuple(_without_tail(piece, row) for piece in _pieces(row)) for row in rows),
        work=0.0 if cost is None else cost_of(rows, cost),
        cu_seqlens_real=torch.tensor(real, dtype=torch.int32) if "cu_seqlens_real" in extras else None,
    )


def _pieces(words: list[Word]) -> list[Piece]:
    """Return the runs of single documents in all T + 1 words of a row."""
    pieces: list[Piece] = []
    for column, word in enumerate(words):
        if column and word.document is words[column - 1].document:
            pieces[-1] = pieces[-1]._replace(length=pieces[-1].length + 1)
        else:
            pieces.append(Piece(word.document.conversation, start=column, length=1, offset=word.offset))
    return pieces


def _without_tail(piece: Piece, words: list[Word]) -> Piece:
    """Return a piece of these words with its real length."""
    return piece._replace(length=sum(word.id != TAIL for word in words[piece.start :][: piece.length]))


def _filled(starts: list[int], step: int, batch_size: int, max_pieces: int) -> list[int]:
    """Return cu_seqlens filled up to the length of every batch: a varying length would make a model recompile."""
    pieces, room = len(starts) - 1, batch_size * max_pieces
    if pieces > room:
        raise ValueError(
            f"max_pieces={max_pieces}: batch {step} has {pieces} pieces, with padding, and room for {room}. "
            f"Pass max_pieces={math.ceil(pieces / batch_size)} or more."
        )
    return starts + [starts[-1]] * (room - pieces)
