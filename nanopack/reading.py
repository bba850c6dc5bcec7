"""Read conversations and make them what the packing gets: rendered, cut, as words.

    conversations.py, render.py   ->   Reader.read(index)   ->   Read   ->   lane.py counts and packs
       by number         to tokens                                           workers.py does it in processes

What goes wrong with a conversation is part of what is read, and told in its place in the order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nanopack.conversations import Source, check
from nanopack.recipe import Recipe
from nanopack.render import Document, make_renderer
from nanopack.ring import Layout
from nanopack.tokenizers import AnyTokenizer


@dataclass
class Read:
    """A conversation as it was read."""

    index: int
    """Its number in the data set."""
    words: np.ndarray | None = None
    """(n,) uint16 or uint32: what waits for a row, see ring.py; None where it is dropped, or bad."""
    tokens: int = 0
    """Of the document, before anything was cut."""
    cut: dict[str, int] = field(default_factory=dict)
    """Tokens that were cut off, by reason."""
    weight: float = 1.0
    """Loss weight of each trained token."""
    own_weight: float = 1.0
    """The conversation's own weight, which that follows from."""
    error: BaseException | None = None
    """What is wrong with it."""


class Reader:
    """Reads conversations by number. Nothing in it changes, so that any process may do it."""

    def __init__(self, source: Source, tokenizer: AnyTokenizer, recipe: Recipe, layout: Layout) -> None:
        """See `make_renderer` for what it raises."""
        self._arguments = source, tokenizer, recipe, layout
        self._source = source
        self._recipe = recipe
        self._word_dtype = layout.word_dtype
        self._loss_bit = layout.word_dtype.type(layout.loss_bit)
        self.render = make_renderer(tokenizer, recipe.template)

    def __reduce__(self) -> tuple[type[Reader], tuple[Source, AnyTokenizer, Recipe, Layout]]:
        # closures do not pickle
        return Reader, self._arguments

    def read(self, index: int) -> Read:
        """Return the conversation of that number, or what is wrong with it."""
        try:
            conversation = check(self._source[index])
            return self._prepare(index, self.render(conversation), conversation.weight)
        # a panic of the tokenizer and an exit in a data set are no Exceptions, and must not be lost
        except BaseException as error:
            return Read(index, error=error)

    def _prepare(self, index: int, document: Document, own_weight: float) -> Read:
        """Cut the document and decide which of its tokens are trained, as the recipe says."""
        ids, mask, cut = document.ids, document.mask, {}
        recipe = self._recipe
        for reason, limit in recipe.limits:
            if len(ids) > limit:
                cut[reason] = len(ids) - limit
                ids, mask = ids[:limit], mask[:limit]
        if recipe.loss == "all":
            mask = np.ones(len(ids), bool)
        if not recipe.boundary_loss:
            mask = mask.copy()
            mask[0] = False
        if recipe.drops_untrained and not mask.any():
            return Read(index, None, len(document.ids), cut)
        words = ids.astype(self._word_dtype)
        words |= np.multiply(mask, self._loss_bit, dtype=words.dtype)
        return Read(index, words, len(document.ids), cut, weigh(recipe, own_weight, mask), own_weight)


def weigh(recipe: Recipe, own_weight: float, mask: np.ndarray) -> float:
    """Return the loss weight of each trained token of a document with this mask."""
    if recipe.weights == "conversation":
        trained = int(np.count_nonzero(mask))
        return own_weight / trained if trained else 0.0
    return 1.0 if recipe.weights is None else own_weight
