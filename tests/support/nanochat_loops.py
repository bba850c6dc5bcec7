"""nanochat's renderer and its three loops, written down again in their plainest form: what they give, ours must give.

Lists only, and nothing of the library: a tokenizer is a tiktoken `Encoding`. Where nanochat's generators write into
globals of the script while they build a batch, these yield the values with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tiktoken

Rendered = tuple[list[int], list[int]]
Render = Callable[[Any], Rendered]
# inputs, targets, approx_progress, last_step, current_epoch
Made = tuple[list[list[int]], list[list[int]], float, bool, int]


def render(encoding: tiktoken.Encoding, conversation: dict[str, Any], max_document_tokens: int = 2048) -> Rendered:
    """Return the ids of a conversation and their loss mask; of a text, what nanochat's base loader makes of it."""
    special = encoding.encode_single_token
    if "text" in conversation:
        ids = [special("<|bos|>"), *encoding.encode_ordinary(conversation["text"])]
        return ids, [1] * len(ids)
    messages = conversation["messages"]
    if messages[0]["role"] == "system":
        merged = messages[0]["content"] + "\n\n" + messages[1]["content"]
        messages = [{"role": "user", "content": merged}, *messages[2:]]
    ids, mask = [special("<|bos|>")], [0]

    def say(text: str, bit: int) -> None:
        tokens = encoding.encode_ordinary(text)
        ids.extend(tokens)
        mask.extend([bit] * len(tokens))

    def mark(name: str, bit: int) -> None:
        ids.append(special(f"<|{name}|>"))
        mask.append(bit)

    for message in messages:
        content = message["content"]
        mark(f"{message['role']}_start", 0)
        if message["role"] == "user":
            say(content, 0)
            mark("user_end", 0)
            continue
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                say(part["text"], 1)
            elif part["type"] == "python":
                mark("python_start", 1)
                say(part["text"], 1)
                mark("python_end", 1)
            else:
                mark("output_start", 0)
                say(part["text"], 0)
                mark("output_end", 0)
        mark("assistant_end", 1)
    return ids[:max_document_tokens], mask[:max_document_tokens]


def midtraining(
    dataset: Any, render: Render, B: int, T: int, rank: int, world_size: int, num_iterations: int = -1
) -> Iterator[Made]:  # fmt: skip
    tokens: list[int] = []
    cursor, epoch, last_step, it = rank, 1, False, 0
    while True:
        while len(tokens) < B * T + 1:
            tokens += render(dataset[cursor])[0]
            cursor += world_size
            if cursor >= len(dataset):
                cursor -= len(dataset)
                epoch += 1
                last_step = True
        it += 1
        if num_iterations > 0 and it >= num_iterations:
            last_step = True
        scratch, tokens = tokens[: B * T + 1], tokens[B * T + 1 :]
        x = [scratch[i * T : (i + 1) * T] for i in range(B)]
        y = [scratch[i * T + 1 : (i + 1) * T + 1] for i in range(B)]
        yield x, y, it / num_iterations if num_iterations > 0 else cursor / len(dataset), last_step, epoch


def sft(
    dataset: Any, render: Render, B: int, T: int, rank: int, world_size: int,
    num_iterations: int = -1, buffer_size: int = 100,
) -> Iterator[Made]:  # fmt: skip
    buffer: list[Rendered] = []
    cursor = consumed = rank
    epoch, last_step, it = 1, False, 0
    while True:
        rows, masks = [], []
        for _ in range(B):
            row: list[int] = []
            mask: list[int] = []
            while len(row) < T + 1:
                while len(buffer) < buffer_size:
                    buffer.append(render(dataset[cursor]))
                    cursor += world_size
                    if cursor >= len(dataset):
                        cursor -= len(dataset)
                        epoch += 1
                best, best_len = -1, 0
                for i, (ids, _) in enumerate(buffer):
                    if best_len < len(ids) <= T + 1 - len(row):
                        best, best_len = i, len(ids)
                if best < 0:
                    bos = buffer[0][0][0]
                    mask += [0] * (T + 1 - len(row))
                    row += [bos] * (T + 1 - len(row))
                    break
                ids, its_mask = buffer.pop(best)
                row += ids
                mask += its_mask
                consumed += world_size
            rows.append(row)
            masks.append(mask)
        it += 1
        if num_iterations > 0 and it >= num_iterations:
            last_step = True
        if consumed >= len(dataset):
            last_step = True
        x = [row[:-1] for row in rows]
        y = [
            [token if bit else -1 for token, bit in zip(row[1:], mask[1:], strict=True)]
            for row, mask in zip(rows, masks, strict=True)
        ]
        yield x, y, it / num_iterations if num_iterations > 0 else consumed / len(dataset), last_step, epoch


def base(
    dataset: Any, render: Render, B: int, T: int, rank: int, world_size: int,
    buffer_size: int = 1000, chunk: int = 128,
) -> Iterator[Made]:  # fmt: skip
    buffer: list[list[int]] = []
    cursor = consumed = rank
    epoch = 1
    while True:
        rows = []
        for _ in range(B):
            row: list[int] = []
            while len(row) < T + 1:
                while len(buffer) < buffer_size:
                    for _ in range(chunk):
                        buffer.append(render(dataset[cursor])[0])
                        cursor += world_size
                        if cursor >= len(dataset):
                            cursor -= len(dataset)
                            epoch += 1
                room = T + 1 - len(row)
                best, best_len = -1, 0
                for i, ids in enumerate(buffer):
                    if best_len < len(ids) <= room:
                        best, best_len = i, len(ids)
                if best < 0:
                    best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
                row += buffer.pop(best)[:room]
                consumed += world_size
            rows.append(row)
        x, y = [row[:-1] for row in rows], [row[1:] for row in rows]
        # nanochat's base loader reports no progress; ours reports it as for every packing by rows.
        yield x, y, consumed / len(dataset), consumed >= len(dataset), epoch
