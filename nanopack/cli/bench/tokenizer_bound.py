"""The bound: how fast tiktoken alone encodes the texts of the same conversations, in one process or several.

    texts   ->   bare()   ->   tokens per second

The tokens counted are those of the rendered documents, special tokens included and cut as in every section, so that a
ratio to this bound compares times for the same conversations. Processes are warm before the clock starts.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import tiktoken

from nanopack.cli.bench.corpus import Data
from nanopack.cli.bench.rounds import Measure, count
from nanopack.tokenizers.tokenizer import regrouped

CALLS = ("encode_ordinary", "encode_to_tiktoken_buffer")
"""The public call, which returns a list, and the core's, which returns bytes: the fastest there is."""
REGROUPED = "pattern regrouped"
"""The core's call with nanopack's equivalent split pattern: shows what the loader costs besides encoding."""
# conversations encoded between two looks at the clock
CHUNK = 32
NOTHING: frozenset[str] = frozenset()


def bare(data: Data, call: str, processes: int) -> Measure[float]:
    """Return the measurement in which `processes` processes encode, each starting at another conversation."""
    # processes that are not forked get all this by pickle
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    texts, tokens, encoding = data.texts, data.tokens, data.tokenizer.encoding

    def measure(seconds: float) -> float:
        pipes, workers = [], []
        for number in range(processes):
            ours, theirs = context.Pipe()
            start = number * len(texts) // processes
            arguments = (theirs, encoding, call, texts[start:] + texts[:start], tokens[start:] + tokens[:start])
            workers.append(context.Process(target=_serve, args=arguments, daemon=True))
            workers[-1].start()
            theirs.close()
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send(seconds)
        measured = sum(pipe.recv() for pipe in pipes)
        for worker in workers:
            worker.join()
        return float(measured)

    return measure


def _serve(
    pipe: Connection, encoding: tiktoken.Encoding, call: str, texts: Sequence[list[str]], tokens: Sequence[int]
) -> None:
    encode = encoder(encoding, call)
    chunks = [
        ([text for chat in texts[at : at + CHUNK] for text in chat], sum(tokens[at : at + CHUNK]))
        for at in range(0, len(texts), CHUNK)
    ]
    endless = itertools.cycle(chunks)

    def work() -> int:
        some, their_tokens = next(endless)
        for text in some:
            encode(text)
        return their_tokens

    for _ in range(4):
        work()
    pipe.send("warm")
    pipe.send(count(work, pipe.recv()))


def encoder(encoding: tiktoken.Encoding, call: str) -> Callable[[str], object]:
    """Return the call of that name without any overhead around it."""
    if call == "encode_ordinary":
        return encoding.encode_ordinary
    if call == REGROUPED:
        encoding = regrouped(encoding)
    core = encoding._core_bpe.encode_to_tiktoken_buffer

    def encode(text: str) -> object:
        return core(text, NOTHING)

    return encode
