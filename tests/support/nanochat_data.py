"""Data for nanochat's loops and for ours in their place, drawn from a seed."""

from __future__ import annotations

import random
from functools import partial
from itertools import islice
from typing import Any

import nanochat_loops
import tiktoken

from nanopack.adapters.nanochat import Progress, base_loader, mid_loader, sft_loader
from nanopack.tokenizers.tokenizer import load_tokenizer

ENCODING = load_tokenizer("chat32k").encoding
RENDER = partial(nanochat_loops.render, ENCODING)
B, T, W, BATCHES = 2, 96, 4, 200
WORDS = ["night", " shift", " 2026", "\n\n", " naïve", " 夜", "<|bos|>", " the", "'s", " x = 1", "<|assistant_end|>"]


class NanochatTokenizer:
    """Nanochat's own object, as far as it matters here."""

    def __init__(self, enc: tiktoken.Encoding) -> None:
        self.enc = enc


TOKENIZER = NanochatTokenizer(ENCODING)


class Task:
    """A data set as nanochat's: it has a length, and takes Python's integers only."""

    def __init__(self, conversations: list[dict[str, Any]]) -> None:
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert type(index) is int
        return self.conversations[index]


def words(rng: random.Random, most: int) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(0, most)))


def content(rng: random.Random, role: str) -> Any:
    """What somebody says; the assistant at times in parts."""
    if role == "user" or rng.random() < 0.6:
        return words(rng, 6)
    kinds = rng.choices(["text", "python", "python_output"], k=rng.randint(0, 3))
    return [{"type": kind, "text": words(rng, 4)} for kind in kinds]


def conversation(rng: random.Random) -> dict[str, Any]:
    system = [{"role": "system", "content": words(rng, 4)}] if rng.random() < 0.3 else []
    turns = [
        {"role": role, "content": content(rng, role)} for role in islice(["user", "assistant"] * 2, rng.randint(1, 4))
    ]
    # nanochat's tasks give more than messages.
    return {"messages": system + turns, "subject": "x", "letters": ["A", "B"]}


def task(seed: int, n: int) -> Task:
    rng = random.Random(seed)
    return Task([conversation(rng) for _ in range(n)])


TRAIN, VAL = task(seed=1, n=601), task(seed=2, n=97)
TEXTS = [words(random.Random(i), 90) for i in range(601)]
RECORDS = [{"text": text} for text in TEXTS]

LOADERS: dict[str, tuple[Any, Any, Any, Any]] = {
    "mid": (mid_loader, TRAIN, nanochat_loops.midtraining, TRAIN),
    "sft": (sft_loader, TRAIN, nanochat_loops.sft, TRAIN),
    "base": (base_loader, TEXTS, nanochat_loops.base, RECORDS),
}


def shown(progress: Progress) -> tuple[float, bool, int]:
    return progress.approx_progress, progress.last_step, progress.current_epoch
