"""How much faster is a loader with encoder="fast"?  python bench/encoders.py [FILES...]

On the conversations that ship with nanopack, or those of the files: the bare loop of tiktoken over all texts, its ids
as a numpy array, that of the fast encoder a conversation at a time, and Loader(workers=0) and Loader(workers=2) with
either, from the first batch to the end of the data. They take turns in one run; told are medians of tokens a second and
ratios to tiktoken's bare loop, which uses one core. Before anything is timed all ids are compared. The loop and
workers=0 are also told by the time of the processor, which a busy machine disturbs less.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata, resources

import numpy as np
import torch

from nanopack import Loader
from nanopack.conversations import check, open_conversations
from nanopack.fast import FastTokenizer
from nanopack.tokenizers import load_tokenizer

FILES = sys.argv[1:] or [str(resources.files("nanopack") / "data" / "conversations.jsonl")]
TOKENIZER = load_tokenizer("chat32k")
FAST = FastTokenizer(TOKENIZER.encoding)
EPOCHS, TURNS = 8, 5


@dataclass
class Times:
    """Tokens a second, a number a turn: by the clock, and by this process's time on a processor."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def take(self, run: Callable[[], int]) -> None:
        """Time what returns how many tokens it had."""
        began, began_processor = time.perf_counter(), time.process_time()
        tokens = run()
        self.wall.append(tokens / (time.perf_counter() - began))
        self.processor.append(tokens / (time.process_time() - began_processor))


def texts_of_all() -> list[list[str]]:
    """Return the texts of each conversation."""
    source, found = open_conversations(FILES), []
    for index in range(len(source)):
        contents = [message.content for message in check(source[index]).messages]
        parts = [[c] if isinstance(c, str) else [part.text for part in c] for c in contents]
        found.append([text for part in parts for text in part])
    return found


def bare_tiktoken(conversations: list[list[str]]) -> int:
    """Encode everything in the tightest loop that there is; return the number of tokens."""
    encode, nothing = TOKENIZER.encoding._core_bpe.encode_to_tiktoken_buffer, frozenset[str]()
    return sum(
        len(np.frombuffer(encode(text, nothing), np.uint32)) for texts in conversations * EPOCHS for text in texts
    )


def bare_fast(conversations: list[list[str]]) -> int:
    """Encode everything a conversation at a time, guards and spot checks included; return the number of tokens."""
    return sum(len(FAST.encode_batch(texts)[0]) for texts in conversations * EPOCHS)


def load(encoder: str | None, workers: int, times: Times) -> None:
    """Time a loader from its first batch on: not its construction, with which go the comparisons of the encoders."""
    with Loader(FILES, TOKENIZER, epochs=EPOCHS, encoder=encoder, workers=workers) as loader:
        next(loader)
        times.take(lambda: sum(batch.num_tokens for batch in loader))


def main() -> None:
    """Measure, print a table, and the same numbers as JSON on the last line."""
    torch.set_num_threads(1)
    conversations = texts_of_all()
    for texts in conversations:
        for text, ids in zip(texts, map(FAST.encode, texts), strict=True):
            assert np.array_equal(ids, TOKENIZER.encode(text)), FAST.difference(text)
    ways: dict[str, Callable[[Times], None]] = {
        "bare tiktoken": lambda times: times.take(lambda: bare_tiktoken(conversations)),
        "bare fast": lambda times: times.take(lambda: bare_fast(conversations)),
        "workers=0, tiktoken": lambda times: load(None, 0, times),
        "workers=0, fast": lambda times: load("fast", 0, times),
        "workers=2, tiktoken": lambda times: load(None, 2, times),
        "workers=2, fast": lambda times: load("fast", 2, times),
    }
    taken = {way: Times() for way in ways}
    for _ in range(TURNS):
        for way, run in ways.items():
            run(taken[way])
    bare = taken["bare tiktoken"]
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("tiktoken", "splintr-rs", "torch"))
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {packages}")
    print(f"{'':<22}{'Mtok/s':>8}{'ratio':>8}{'of processor time':>20}")
    result: dict[str, float] = {}
    for way in ways:
        speed = statistics.median(taken[way].wall)
        result[way] = speed / statistics.median(bare.wall)
        line = f"{way:<22}{speed / 1e6:>8.2f}{result[way]:>7.2f}x"
        if "workers=2" not in way:
            own = f"{way}, processor"
            result[own] = statistics.median(taken[way].processor) / statistics.median(bare.processor)
            line += f"{result[own]:>19.2f}x"
        print(line)
    print(json.dumps({way: round(ratio, 3) for way, ratio in result.items()}))


if __name__ == "__main__":
    main()
