"""Say where one slot of a batch came from, and why its target is trained or not.

    Batch.word_pieces + the conversation, rendered anew   ->   explain()   ->   Explanation, which prints as a sentence

Works on the host from what the batch tells of its pieces; no tensor is looked at.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from nanopack.batch import Batch, Piece
from nanopack.conversations import Conversation, Source, check
from nanopack.recipe import Recipe
from nanopack.render import Document
from nanopack.tokenizers import AnyTokenizer


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
    masked: bool = False
    """Whether it came as input_ids, with a mask."""

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


def explain(
    batch: Batch,
    row: int,
    col: int,
    *,
    source: Source,
    tokenizer: AnyTokenizer,
    render: Callable[[Conversation], Document],
    recipe: Recipe,
) -> Explanation:
    """Return what stands at `inputs[row, col]` and `targets[row, col]`.

    Raises IndexError where the batch has no such row or column, TypeError where one is no int.
    """
    for name, index, size in (("row", row, recipe.batch_size), ("col", col, recipe.seq_len)):
        if not hasattr(index, "__index__"):
            raise TypeError(f"{name}={index!r} is not an int; use 0 to {size - 1}")
        if not 0 <= index < size:
            raise IndexError(f"{name}={index} is outside the batch; use 0 to {size - 1}")

    def token(column: int) -> Token | None:
        piece = next((p for p in batch.word_pieces[row] if p.start <= column < p.start + p.length), None)
        return None if piece is None else _token(piece, column, source, tokenizer, render, recipe)

    here, following = token(col), token(col + 1)
    trained = following is not None and following.trained
    return Explanation(here, following, trained, _reason(here, following, recipe))


def _token(
    piece: Piece,
    column: int,
    source: Source,
    tokenizer: AnyTokenizer,
    render: Callable[[Conversation], Document],
    recipe: Recipe,
) -> Token:
    conversation = check(source[piece.conversation])
    document = render(conversation)
    offset = piece.offset + column - piece.start
    # a merged system message begins where the user's does: the later one is meant
    message = bisect_right(document.starts, offset) - 1
    token_id = int(document.ids[offset])
    return Token(
        conversation=piece.conversation,
        where=source.where(piece.conversation),
        offset=offset,
        message=message if message >= 0 else None,
        role=conversation.messages[message].role if message >= 0 else None,
        id=token_id,
        text=tokenizer.decode([token_id]),
        trained=bool(recipe.loss == "all" or document.mask[offset]) and (recipe.boundary_loss or offset > 0),
        masked=conversation.tokens is not None,
    )


def _reason(here: Token | None, target: Token | None, recipe: Recipe) -> str:
    if here is None:
        return "this is padding"
    if target is None:
        return "nothing follows it in the row but padding"
    if target.offset == 0 and not recipe.boundary_loss:
        return "the target begins another document, and boundary_loss=False"
    if recipe.loss == "all":
        return 'loss="all" trains every token'
    if target.masked:
        return f"its loss_mask {'trains' if target.trained else 'does not train'} it"
    if recipe.template == "hf":
        return f"template 'hf' {'trains' if target.trained else 'does not train'} this token"
    if target.message is None:
        return "the text is trained as a whole" if target.trained else "the target begins another document"
    if target.trained:
        return f"template {recipe.template_name!r} trains this part of the assistant's message"
    if target.role == "assistant":
        return f"template {recipe.template_name!r} does not train this part of an assistant's message"
    return f"template {recipe.template_name!r} trains no {target.role} message"
