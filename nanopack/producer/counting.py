"""Count the batches beforehand: render everything once, keep the lengths, and pack those.

lanes' shares of the data   ->   count_batches()   ->   len(loader), and when a rank that has no more may end
 order.py, reading.py              packing.py
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.conversations.order import Share
from nanopack.conversations.records import Source
from nanopack.producer.reader import Read
from nanopack.producer.shard import ReadAll, packer_of, refuse


def count_batches(source: Source, config: LoaderConfig, lanes: Iterable[int], read_all: ReadAll) -> tuple[int, int]:
    """Return how many batches these lanes give until the last of them is done, and the tokens that they emit.

    Each conversation is rendered once, and only its length kept: 8 bytes. Raises as `Lane.next_rows` does.
    """
    epochs, n, width = config.epochs or 1, len(source), len(config.all_lanes)
    shares = [Share(n, number, width, config.seed) for number in lanes]
    # every conversation, unless the lanes are few: in one pass each reads its own part
    wanted = np.zeros(n, bool)
    for share in shares:
        wanted[np.fromiter(share.conversations(0, share.reads(epochs)), np.int64)] = True
    lengths = np.zeros(n, np.int64)
    for read in read_all(np.flatnonzero(wanted).tolist()):
        lengths[read.index] = _packed_length(read, source, config)
    batches = tokens = 0
    for share in shares:
        these = lengths[np.fromiter(share.conversations(0, share.reads(epochs)), np.int64)]
        numbered = enumerate(these[these > 0].tolist())
        packer = packer_of(config, partial(next, numbered, None))
        count = 0
        while packer.next_rows():
            count += 1
        batches, tokens = max(batches, count), tokens + packer.emitted
    return batches, tokens


def _packed_length(read: Read, source: Source, config: LoaderConfig) -> int:
    """Return how long a conversation is for the packing; 0 where it is dropped or skipped."""
    if read.error is not None:
        refuse(read, source, config)
    return 0 if read.words is None else len(read.words)
