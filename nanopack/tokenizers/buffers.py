"""What encoders of many texts at once share. Buffers are bytes of uint32s, as tiktoken gives them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np


def joined(buffers: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated uint32s of all buffers, (n,), and offsets, (len(buffers) + 1,) int64."""
    # only `nbytes` of a memoryview of tiktoken's buffer is right: its shape is not
    sizes = [len(buffer) if isinstance(buffer, bytes) else memoryview(buffer).nbytes for buffer in buffers]
    ends_bytes = np.fromiter(accumulate(sizes, initial=0), np.int64, len(buffers) + 1)
    return np.frombuffer(b"".join(buffers), np.uint32), ends_bytes // 4


def due_texts(texts: Sequence[str | bytes], encoded: int, every: int) -> list[int]:
    """Return the places of the texts to compare: every n-th of all, starting with the first; `encoded` came before."""
    places = [place for place, text in enumerate(texts) if isinstance(text, str)]
    return places[-encoded % every :: every]


def as_buffer(ids: Sequence[int]) -> bytes:
    """Return the ids as bytes of uint32s."""
    return np.array(ids, np.uint32).tobytes()


def mended_text(text: str) -> str:
    """Return the text with U+FFFD for lone surrogates, as tiktoken's encode_ordinary has it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
