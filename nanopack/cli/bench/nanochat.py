"""What nanopack replaces: karpathy/nanochat's renderer and two of its generators, rewritten to work as they do.

    chats   ->   midtraining(), sft()   ->   inputs, targets, tokens that are not padding

Lists and loops are kept, since faster code would measure something else. (The tests, which do not ship, have them once
more in their plainest form, to test these and the adapters.) Sources:
`render_conversation` in nanochat/tokenizer.py, `mid_data_generator` in scripts/mid_train.py (until January 2026),
`sft_data_generator_bos_bestfit` in scripts/chat_sft.py. Left out: progress, epochs and the split, which cost nothing.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tiktoken
import torch

MAX_TOKENS = 2048
Rendered = tuple[list[int], list[int]]
Render = Callable[[Any], Rendered]
Made = tuple[torch.Tensor, torch.Tensor, int]


def renderer(encoding: tiktoken.Encoding) -> Render:
    """Return the function that renders a chat: ids and loss mask."""
    special = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    bos = special["<|bos|>"]
    user_start, user_end = special["<|user_start|>"], special["<|user_end|>"]
    assistant_start, assistant_end = special["<|assistant_start|>"], special["<|assistant_end|>"]
    python_start, python_end = special["<|python_start|>"], special["<|python_end|>"]
    output_start, output_end = special["<|output_start|>"], special["<|output_end|>"]

    def render(conversation: Any) -> Rendered:
        ids: list[int] = []
        mask: list[int] = []

        def add(tokens: int | list[int], bit: int) -> None:
            if isinstance(tokens, int):
                tokens = [tokens]
            ids.extend(tokens)
            mask.extend([bit] * len(tokens))

        messages = conversation["messages"]
        if messages[0]["role"] == "system":
            messages = copy.deepcopy(messages)
            messages[1]["content"] = messages[0]["content"] + "\n\n" + messages[1]["content"]
            messages = messages[1:]
        add(bos, 0)
        for message in messages:
            content = message["content"]
            if message["role"] == "user":
                add(user_start, 0)
                add(encoding.encode_ordinary(content), 0)
                add(user_end, 0)
                continue
            add(assistant_start, 0)
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                tokens = encoding.encode_ordinary(part["text"])
                if part["type"] == "text":
                    add(tokens, 1)
                elif part["type"] == "python":
                    add(python_start, 1)
                    add(tokens, 1)
                    add(python_end, 1)
                else:
                    add(output_start, 0)
                    add(tokens, 0)
                    add(output_end, 0)
            add(assistant_end, 1)
        return ids[:MAX_TOKENS], mask[:MAX_TOKENS]

    return render


def midtraining(
    dataset: Sequence[Any], render: Render, B: int, T: int, *, rank: int = 0, world_size: int = 1, device: str = "cpu"
) -> Iterator[Made]:
    """Yield batches of the next B*T+1 tokens. On the CPU, targets alias a buffer that the next batch overwrites."""
    on_gpu = device == "cuda"
    needed = B * T + 1
    tokens: deque[int] = deque()
    scratch = torch.empty(needed, dtype=torch.int64, pin_memory=on_gpu)
    cursor = rank
    while True:
        while len(tokens) < needed:
            ids, _ = render(dataset[cursor])
            tokens.extend(ids)
            cursor += world_size
            if cursor >= len(dataset):
                cursor %= len(dataset)
        for i in range(needed):
            scratch[i] = tokens.popleft()
        inputs = scratch[:-1].to(torch.int32).view(B, T).to(device, torch.int32, non_blocking=on_gpu)
        targets = scratch[1:].view(B, T).to(device, torch.int64, non_blocking=on_gpu)
        yield inputs, targets, B * T


def sft(
    dataset: Sequence[Any],
    render: Render,
    B: int,
    T: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    buffer_size: int = 100,
) -> Iterator[Made]:
    """Yield batches of whole chats: each row takes the longest that fits, and padding once none does."""
    on_gpu = device == "cuda"
    buffer: list[Rendered] = []
    cursor = rank
    while True:
        rows, mask_rows, lengths = [], [], []
        for _ in range(B):
            row: list[int] = []
            mask_row: list[int] = []
            length = T + 1
            while len(row) < T + 1:
                while len(buffer) < buffer_size:
                    buffer.append(render(dataset[cursor]))
                    cursor += world_size
                    if cursor >= len(dataset):
                        cursor %= len(dataset)
                remaining = T + 1 - len(row)
                best, best_len = -1, 0
                for i, (ids, _) in enumerate(buffer):
                    ids_len = len(ids)
                    if ids_len <= remaining and ids_len > best_len:
                        best, best_len = i, ids_len
                if best < 0:
                    length = len(row)
                    row.extend([buffer[0][0][0]] * remaining)
                    mask_row.extend([0] * remaining)
                    break
                ids, mask = buffer.pop(best)
                row.extend(ids)
                mask_row.extend(mask)
            rows.append(row)
            mask_rows.append(mask_row)
            lengths.append(length)
        yield *_tensors(rows, mask_rows, lengths, device, on_gpu), sum(min(length, T) for length in lengths)


def _tensors(
    rows: list[list[int]], mask_rows: list[list[int]], lengths: list[int], device: str, on_gpu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = torch.tensor(rows, dtype=torch.long, pin_memory=on_gpu)
    inputs = batch[:, :-1].to(device, torch.int32, non_blocking=on_gpu).contiguous()
    targets = batch[:, 1:].to(device, torch.int64, non_blocking=on_gpu).contiguous()
    mask = torch.tensor(mask_rows, dtype=torch.int8)[:, 1:].to(device)
    targets[mask == 0] = -1
    for i, length in enumerate(lengths):
        if length < batch.shape[1]:
            targets[i, length - 1 :] = -1
    return inputs, targets
