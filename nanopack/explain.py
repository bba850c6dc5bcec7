"""Say where one slot of a batch came from, and why its target is trained or not.

    Batch.word_pieces + the conversation, rendered anew   ->   explain()   ->   Explanation, which prints as a sentence

Works on the host from what the batch tells of its pieces; no tensor is looked at.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from nanopack.batch import Batch, Piece
from nanopack.config import LoaderConfig
from nanopack.conversations.records import Conversation, check, choose
from nanopack.conversations.source import Source
from nanopack.render.renderer import Document
from nanopack.tokenizers.tokenizer import AnyTokenizer


@dataclass(frozen=True)
class Token:
    """One token of a batch and its origin."""

    conversation: int
    """Index in the data set."""
    where: str
    """The same as a reader finds it: file and line where there are any."""
    offset: int
    """Place in the document, from 0."""
    message: int | None
    """Index of the message, None for the token that begins the document and for plain text."""
    role: str | None
    id: int
    text: str
    trained: bool
    """Whether the loss counts it where it is a target."""
    tokenized: bool = False
    """Whether it came as input_ids."""
    masked: bool = False
    """Whether it came with a mask."""

    def __str__(self) -> str:
        """Return text and origin in a few words."""
        part = "" if self.message is None else f", message {self.message} ({self.role})"
        return f"{self.text!r} ({self.where}{part}, token {self.offset})"


@dataclass(frozen=True)
class Explanation:
    """What stands in one slot of `inputs` and `targets`."""

    input: Token | None
    """None: padding."""
    target: Token | None
    """The token after it in the row, whether trained or not; None: padding, or the row ends."""
    trained: bool
    reason: str

    def __str__(self) -> str:
        """Return the explanation as a sentence."""
        verdict = "trained" if self.trained else "not trained"
        return f"input {self.input or 'padding'}; target {self.target or 'padding'}: {verdict}, {self.reason}"


def text_of(ids: Sequence[int], tokenizer: AnyTokenizer) -> str:
    """Return the text of ids. One that the tokenizer does not use, which input_ids may hold, stands as itself: <17>."""
    try:
        return tokenizer.decode(ids)
    except ValueError:
        # not one by one: a character may be of several tokens
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
    """Return what stands at `inputs[row, col]` and `targets[row, col]`.

    Raises IndexError where the batch has no such row or column, TypeError where one is no int.
    """
    for name, index, size in (("row", row, config.batch_size), ("col", col, config.seq_len)):
        if not hasattr(index, "__index__"):
            raise TypeError(f"{name}={index!r} is not an int; use 0 to {size - 1}")
        if not 0 <= index < size:
            raise IndexError(f"{name}={index} is outside the batch; use 0 to {size - 1}")

    pieces = [p for p in batch.word_pieces[row] if p.start <= col + 1 and col < p.start + p.length]
    here, following = _tokens(pieces, range(col, col + 2), source, tokenizer, render, config)
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
    """Return what `explain` says of each slot of a row; a conversation is rendered once for all of its slots."""
    columns = range(config.seq_len + 1)
    tokens = _tokens(batch.word_pieces[row], columns, source, tokenizer, render, config)
    return [_explained(here, following, config) for here, following in itertools.pairwise(tokens)]


def _explained(here: Token | None, following: Token | None, config: LoaderConfig) -> Explanation:
    trained = following is not None and following.trained
    return Explanation(here, following, trained, _reason(here, following, config))


def _tokens(
    pieces: Sequence[Piece],
    columns: range,
    source: Source,
    tokenizer: AnyTokenizer,
    render: Callable[[Conversation], Document],
    config: LoaderConfig,
) -> list[Token | None]:
    """Return what stands in each of the columns, which follow each other: a token of one of the pieces, or None."""
    found: dict[int, Token] = {}
    for piece in pieces:
        conversation = choose(check(source[piece.conversation]), config.loss, config.first_assistant)
        document, where = render(conversation), source.where(piece.conversation)
        for column in range(max(piece.start, columns[0]), min(piece.start + piece.length, columns[-1] + 1)):
            offset = piece.offset + column - piece.start
            found[column] = _token(piece.conversation, where, offset, conversation, document, tokenizer, config)
    return [found.get(column) for column in columns]


def _token(
    index: int,
    where: str,
    offset: int,
    conversation: Conversation,
    document: Document,
    tokenizer: AnyTokenizer,
    config: LoaderConfig,
) -> Token:
    # a merged system message begins where the user's does: the later one is meant
    message = bisect_right(document.starts, offset) - 1
    token_id = int(document.ids[offset])
    return Token(
        conversation=index,
        where=where,
        offset=offset,
        message=message if message >= 0 else None,
        role=conversation.messages[message].role if message >= 0 else None,
        id=token_id,
        text=text_of([token_id], tokenizer),
        trained=bool(config.loss == "all" or document.mask[offset]) and (config.boundary_loss or offset > 0),
        tokenized=conversation.tokens is not None,
        masked=conversation.tokens is not None and conversation.tokens.mask is not None,
    )


def _reason(here: Token | None, target: Token | None, config: LoaderConfig) -> str:
    if here is None:
        return "this is padding"
    if target is None:
        return "nothing follows it in the row but padding"
    if target.offset == 0 and not config.boundary_loss:
        return "the target begins another document, and boundary_loss=False"
    if config.loss == "all":
        return 'loss="all" trains every token'
    if target.masked:
        return f"its mask {'puts it in' if target.trained else 'keeps it out of'} the loss"
    if target.tokenized:
        return "it came as input_ids, and no mask keeps it out of the loss"
    if config.template == "hf":
        return f"template 'hf' {'trains' if target.trained else 'does not train'} this token"
    if target.message is None:
        return "the text is trained as a whole" if target.trained else "the target begins another document"
    if target.trained:
        return f"template {config.template_name!r} trains this part of the {target.role}'s message"
    if target.role == "assistant":
        return f"template {config.template_name!r} does not train this part of an assistant's message"
    return f"template {config.template_name!r} trains no {target.role} message"
