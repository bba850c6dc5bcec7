"""Inputs for loaders and their reference: byte tokenizers, the shipped conversations, random data and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tiktoken
import torch
from hypothesis import strategies as st

from nanopack.config import EXTRAS
from nanopack.data import CONVERSATIONS
from nanopack.packing import packings
from nanopack.tokenizers.tokenizer import NANOCHAT_SPECIAL_TOKENS

PACKINGS = ["best_fit", "stream", "best_fit_pad", "best_fit_crop", "pad"]
SPECIAL_TOKENS = (*NANOCHAT_SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>")


SHIPPED = Path(CONVERSATIONS)
"""The conversations in the package."""


def byte_tokenizer(more_ids: int = 0, specials: Sequence[str] = SPECIAL_TOKENS) -> tiktoken.Encoding:
    """One token per byte, so that lengths are easy to see. The special tokens' ids start at 256 + more_ids."""
    return tiktoken.Encoding(
        "bytes",
        pat_str=r"(?s:.)",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={name: 256 + more_ids + i for i, name in enumerate(specials)},
    )


SMALL, LARGE = byte_tokenizer(), byte_tokenizer(more_ids=100_000)
texts = st.text("abc é", max_size=12)
weights = st.none() | st.floats(0, 4, width=32)


@st.composite
def chats(draw):
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for i in range(draw(st.integers(1, 4))):
        content = draw(texts)
        if i % 2 and draw(st.booleans()):
            kinds = st.sampled_from(["text", "python", "python_output"])
            content = [{"type": draw(kinds), "text": draw(texts)} for _ in range(draw(st.integers(0, 3)))]
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    record = {"messages": messages}
    return record if (weight := draw(weights)) is None else {**record, "weight": weight}


plain_texts = st.fixed_dictionaries({"text": texts}, optional={"weight": st.floats(0, 2)})


@st.composite
def rendered_elsewhere(draw):
    ids = draw(st.lists(st.integers(0, 255), min_size=1, max_size=30))
    record = {"input_ids": draw(st.sampled_from([list, np.uint8, np.int32, np.uint64, torch.tensor]))(ids)}
    if draw(st.booleans()):
        mask = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        record["loss_mask"] = draw(st.sampled_from([list, np.array, np.int8]))(mask)
    return record


data_sets = st.lists(chats() | plain_texts | rendered_elsewhere(), min_size=1, max_size=12)


costs = st.tuples(st.floats(0, 1e5), st.floats(0.001, 1e5))


@st.composite
def drawn_arguments(draw, packing):
    arguments = {
        "batch_size": draw(st.integers(1, 4)),
        "seq_len": draw(st.integers(1, 24) | st.sampled_from([64, 128])),
        "loss": draw(st.sampled_from(["assistant", "all"])),
        "loss_weights": draw(st.sampled_from([None, "token", "conversation"])),
        "extras": tuple(draw(st.sets(st.sampled_from(EXTRAS)))),
        "max_document_tokens": draw(st.none() | st.integers(1, 40)),
        "boundary_loss": draw(st.booleans()),
        "ignore_index": draw(st.sampled_from([-100, -1])),
        "world_size": draw(st.integers(1, 14)),
        "shard": draw(st.sampled_from(["rank", "row"])),
        "seed": draw(st.none() | st.integers(0, 2**64 - 1)),
        "epochs": draw(st.none() | st.integers(1, 3)),
    }
    arguments["rank"] = draw(st.integers(0, arguments["world_size"] - 1))
    if packing != "stream" and (balance := draw(st.none() | costs)) is not None:
        arguments |= {"balance": balance, "balance_window": draw(st.none() | st.integers(1, 5))}
    if packing not in ("stream", "best_fit_crop"):
        divisors = [n for n in (1, 1, 2, 3, 8, 16) if arguments["seq_len"] % n == 0]
        arguments["document_align"] = draw(st.sampled_from(divisors))
    if not {"cu_seqlens", "cu_seqlens_real"}.isdisjoint(arguments["extras"]):
        arguments["max_pieces"] = arguments["seq_len"]
    options = {"window": st.integers(1, 6), "refill": st.integers(1, 3), "max_age": st.integers(1, 5)}
    options["overlap"] = st.booleans()
    kind = packings.PACKINGS[packing]
    arguments["packing"] = kind(**{name: draw(options[name]) for name in kind().options()})
    return arguments
