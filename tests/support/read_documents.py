"""The documents of chunks, one by one, as tests like to look at them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.producer.chunk import Chunk, weigh


class ReadDocument(NamedTuple):
    """One document of a chunk."""

    conversation: int
    words: np.ndarray
    num_tokens: int
    length: int
    loss_tokens: int
    weight: float
    own_weight: float
    dropped: bool
    error: BaseException | None

    def facts(self) -> tuple[Any, ...]:
        """All of it, to compare."""
        error = None if self.error is None else (type(self.error), str(self.error))
        return (self.conversation, self.words.dtype, self.words.tolist(), *self[2:-1], error)


def documents_of(chunks: Chunk | Iterable[Chunk], config: LoaderConfig) -> list[ReadDocument]:
    """The documents of one chunk, or of several."""
    if not isinstance(chunks, Chunk):
        return [document for chunk in chunks for document in documents_of(chunk, config)]
    weights = weigh(config, chunks.own_weights, chunks.loss_tokens)
    dropped = chunks.dropped(config).tolist()
    return [
        ReadDocument(
            conversation=int(chunks.conversations[position]),
            words=chunks.words(position),
            num_tokens=int(chunks.num_tokens[position]),
            length=int(chunks.lengths[position]),
            loss_tokens=int(chunks.loss_tokens[position]),
            weight=1.0 if weights is None else float(weights[position]),
            own_weight=1.0 if chunks.own_weights is None else float(chunks.own_weights[position]),
            dropped=dropped[position],
            error=chunks.troubles[position].error if position in chunks.troubles else None,
        )
        for position in range(len(chunks.lengths))
    ]
