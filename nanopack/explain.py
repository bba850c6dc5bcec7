"""Say where one position of a batch came from, and why its target is in the loss or not.

    Batch.word_pieces + the conversation, rendered again   ->   explain()   ->   Explanation, which prints as a sentence

Works on the host, from the batch's list of pieces; of the tensors it reads only the ids that it explains.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from nanopack.batch import Batch, Piece
from nanopack.config import LoaderConfig
from nanopack.conversations.fetch import peek
from nanopack.conversations.records import Conversation, check, choose
from nanopack.conversations.source import Source
from nanopack.render.document import Document
from nanopack.tokenizers.tokenizer import AnyTokenizer


@dataclass(frozen=True)
class Token:
    """One token of a batch and its origin."""

    conversation: int
    """Index in the data set."""
    where: str
    """File and line if there are any, else the index again."""
    offset: int
    """Index in the document, from 0."""
    message: int | None
    """Index of the message, None for the token that begins the document and for plain text."""
    role: str | None
    id: int
    text: str
    in_loss: bool
    """Whether it is in the loss as a target."""
    tokenized: bool = False
    """Whether it came as input_ids."""
    masked: bool = False
    """Whether it came with a mask."""

    def __str__(self) -> str:
        """Text and origin on one line."""
        part = "" if self.message is None else f", message {self.message} ({self.role})"
        return f"{self.text!r} ({self.where}{part}, token {self.offset})"


@dataclass(frozen=True)
class Explanation:
    """One position (row, col) of `inputs` and `targets`."""

    input: Token | None
    """None: padding."""
    target: Token | None
    """The token after it in the row, in the loss or not; None: padding, or the row ends."""
    in_loss: bool
    reason: str

    def __str__(self) -> str:
        """The explanation as a sentence."""
        verdict = "in the loss" if self.in_loss else "not in the loss"
        return f"input {self.input or 'padding'}; target {self.target or 'padding'}: {verdict}, {self.reason}"


def text_of(ids: Sequence[int], tokenizer: AnyTokenizer) -> str:
    """Return the text of ids. Unused ids, which `input_ids` may hold, appear as numbers: <17>."""
    try:
        return tokenizer.decode(ids)
    except ValueError:
        # not one by one: a character may span several tokens
        runs = itertools.groupby(ids, key=partial(_is_used, tokenizer))
        return "".join(tokenizer.decode(list(run)) if used else "".join(map("<{}>".format, run)) for used, run in runs)


def _is_used(tokenizer: AnyTokenizer, token_id: int) -> bool:
    try:
        tokenizer.decode([token_id])
    except ValueError:
        return False
    return True


def explain(
    batch: Batch,
    row: int,
    col: int,
    *,
    source: Source,
    tokenizer: AnyTokenizer,
    render: Callable[[Conversation], Document],
    config: LoaderConfig,
) -> Explanation:
    """Explain `inputs[row, col]` and `targets[row, col]`.

    IndexError outside 0 <= row < B, 0 <= col < T; TypeError if row or col is not an int; ValueError where the data have
    changed since the batch was made.
    """
    for name, index, size in (("row", row, config.batch_size), ("col", col, config.seq_len)):
        if not hasattr(index, "__index__"):
            raise TypeError(f"{name}={index!r} is not an int; use 0 to {size - 1}")
        if not 0 <= index < size:
            raise IndexError(f"{name}={index} is outside the batch; use 0 to {size - 1}")

    pieces = [p for p in batch.word_pieces[row] if p.start <= col + 1 and col < p.start + p.length]
    here, following = _tokens(batch, row, pieces, range(col, col + 2), source, tokenizer, render, config)
    return _explained(here, following, config)


def explain_row(
    batch: Batch,
    row: int,
    *,
    source: Source,
    tokenizer: AnyTokenizer,
    render: Callable[[Conversation], Document],
    config: LoaderConfig,
) -> list[Explanation]:
    """Explain each position of a row, a list of T; a conversation is rendered once for all of its positions."""
    columns = range(config.seq_len + 1)
    tokens = _tokens(batch, row, batch.word_pieces[row], columns, source, tokenizer, render, config)
    return [_explained(here, following, config) for here, following in itertools.pairwise(tokens)]


def _explained(here: Token | None, following: Token | None, config: LoaderConfig) -> Explanation:
    in_loss = here is not None and following is not None and following.in_loss
    return Explanation(here, following, in_loss, _reason(here, following, config))


def _tokens(
    batch: Batch,
    row: int,
    pieces: Sequence[Piece],
    columns: range,
    source: Source,
    tokenizer: AnyTokenizer,
    render: Callable[[Conversation], Document],
    config: LoaderConfig,
) -> list[Token | None]:
    """Return the token in each of these consecutive columns (0 to T) of one row, or None for padding."""
    found: dict[int, Token] = {}
    ids = batch.inputs[row, columns[0] : columns[-1] + 1].tolist()
    for piece in pieces:
        conversation = choose(check(peek(source, piece.conversation, config.seed)), config.loss, config.first_assistant)
        document, where = render(conversation), source.where(piece.conversation)
        roles = None
        if source.rendered:
            starts, roles = source.messages_of(piece.conversation)
            document = replace(document, starts=starts)
        for column in range(max(piece.start, columns[0]), min(piece.start + piece.length, columns[-1] + 1)):
            offset = piece.offset + column - piece.start
            was = ids[column - columns[0]] if column - columns[0] < len(ids) else None
            if offset >= len(document.ids) or was not in (None, document.ids[offset]):
                raise ValueError(
                    f"{where} is not what the batch was made of: its token {offset} is another one. The data set has "
                    f"changed since it was read; or, with static=True, a later batch is in these tensors"
                )
            found[column] = _token(piece.conversation, where, offset, conversation, document, roles, tokenizer, config)
    return [found.get(column) for column in columns]


def _token(
    index: int,
    where: str,
    offset: int,
    conversation: Conversation,
    document: Document,
    roles: Sequence[str] | None,
    tokenizer: AnyTokenizer,
    config: LoaderConfig,
) -> Token:
    # a merged system message starts where the user's does: take the later one
    message = bisect_right(document.starts, offset) - 1
    token_id = int(document.ids[offset])
    tokens = conversation.tokens
    if roles is None:
        roles = [said.role for said in conversation.messages]
    elif roles or document.mask.all():
        # what became tokens before they were stored
        tokens = None
    return Token(
        conversation=index,
        where=where,
        offset=offset,
        message=message if message >= 0 else None,
        role=roles[message] if message >= 0 else None,
        id=token_id,
        text=text_of([token_id], tokenizer),
        in_loss=bool(config.loss == "all" or document.mask[offset]) and (config.boundary_loss or offset > 0),
        tokenized=tokens is not None,
        masked=tokens is not None and tokens.mask is not None,
    )


def _reason(here: Token | None, target: Token | None, config: LoaderConfig) -> str:
    if here is None:
        return "this is padding"
    if target is None:
        return "nothing follows it in the row but padding"
    if target.offset == 0 and not config.boundary_loss:
        return "the target begins another document, and boundary_loss=False"
    if config.loss == "all":
        return 'loss="all" puts every token in the loss'
    if target.masked:
        return f"its mask {'puts it in' if target.in_loss else 'keeps it out of'} the loss"
    if target.tokenized:
        return "it came as input_ids, and no mask keeps it out of the loss"
    if config.template in ("hf", "hf-training"):
        does = "puts this token in" if target.in_loss else "keeps this token out of"
        return f"template {config.template!r} {does} the loss"
    if target.message is None:
        return "all of a plain text is in the loss" if target.in_loss else "the target begins another document"
    if target.in_loss:
        return f"template {config.template_name!r} puts this part of the {target.role}'s message in the loss"
    if target.role == "assistant":
        return f"template {config.template_name!r} keeps this part of the assistant's message out of the loss"
    return f"template {config.template_name!r} keeps what the {target.role} says out of the loss"
