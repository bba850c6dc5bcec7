"""The slow packer's balance: what a row costs, and which of a window's rows are delivered with which step.

    batches of a shard as they are packed   ->   balanced()   ->   the same rows, dealt by cost, window by window

Part of the definition; it shares nothing with the fast path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nanopack.reference.packing import TAIL, Rows, Word

Row = list[Word]

BITS64 = 2**64 - 1


def cost_of_documents(balance: Any) -> tuple[float, float]:
    """Return (a, b) of the cost a * L + b * L^2 of a document, from a pair, the sizes of a model or its config."""
    if isinstance(balance, (tuple, list)):
        a, b = balance
        return float(a), float(b)
    if hasattr(balance, "layers"):
        known = {name: getattr(balance, name) for name in ("layers", "hidden", "heads", "mlp", "vocab")}
        kv_heads, head_dim = balance.kv_heads, balance.head_dim
        matrices, experts = 3 if balance.gated else 2, balance.experts_per_token
    else:
        known, kv_heads, head_dim, matrices, experts = _of_config(balance)
    layers, hidden, heads = known["layers"], known["hidden"], known["heads"]
    head_dim = head_dim or hidden // heads
    # Parameters in matrices: queries and output, keys and values, the MLP, the head.
    parameters = 2 * hidden * heads * head_dim + 2 * hidden * (kv_heads or heads) * head_dim
    parameters += matrices * hidden * known["mlp"] * experts
    parameters = layers * parameters + hidden * known["vocab"]
    # 6 FLOPs a parameter and token; 12 a pair, layer and channel, and a causal mask leaves half of the pairs.
    return float(6 * parameters), float(12 * layers * heads * head_dim // 2)


def _of_config(config: Any) -> tuple[dict[str, int], int | None, int | None, int, int]:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    inner = getattr(config, "intermediate_size", None)
    known = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "mlp": getattr(config, "moe_intermediate_size", None) or inner or 4 * config.hidden_size,
        "vocab": config.vocab_size,
    }
    two = ["apertus", "arcee", "biogpt", "gpt_neox", "jais2", "nanochat", "nemotron", "persimmon", "phi", "starcoder2"]
    matrices = 2 if inner is None or getattr(config, "model_type", "") in two else 3
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return known, getattr(config, "num_key_value_heads", None), getattr(config, "head_dim", None), matrices, experts


def lengths_in(row: list[Word]) -> list[int]:
    """Return the number of words of each document in a row, without tails."""
    counts: dict[int, int] = {}
    for word in row:
        if word.id == TAIL:
            continue
        counts[id(word.document)] = counts.get(id(word.document), 0) + 1
    return list(counts.values())


def cost_of(rows: Rows, cost: tuple[float, float]) -> float:
    """Return the cost of the documents in these rows, rounded as floats are: two products and a sum."""
    lengths = [length for row in rows for length in lengths_in(row)]
    return cost[0] * sum(lengths) + cost[1] * sum(length**2 for length in lengths)


def balanced(
    packed: Iterator[tuple[Rows, int]], cost: tuple[float, float], window: int, seed: int | None
) -> Iterator[tuple[Rows, int]]:
    """Yield the rows of each batch, dealt within windows, and how many documents have been placed by then.

    A batch is delivered once `window` batches are packed that are not delivered, this one counted; at the end of the
    data, as many as there are.
    """
    number = placed = 0
    dealt: list[Rows] = []
    coming: list[Rows] = []
    while True:
        while len(dealt) + len(coming) < window and (item := next(packed, None)) is not None:
            coming.append(item[0])
        if not dealt:
            if not coming:
                return
            dealt, coming = _deal(coming, cost, number, seed), []
            number += 1
        rows, *dealt = dealt
        placed += sum(len(lengths_in(row)) for row in rows)
        yield rows, placed


def _deal(batches: list[Rows], cost: tuple[float, float], number: int, seed: int | None) -> list[Rows]:
    """Return the rows of a window, dealt to as many batches, in the order of their delivery."""
    rows = [row for batch in batches for row in batch]
    steps = len(batches)
    groups = _groups([cost_of([row], cost) for row in rows], steps)
    return [[rows[index] for index in sorted(groups[step])] for step in _order(steps, number, seed)]


def _groups(costs: list[float], count: int) -> list[list[int]]:
    """Deal the indices of these costs to groups, from the costliest on: 0, 1, ..., last, last, ..., 1, 0, 0, 1, ..."""
    groups: list[list[int]] = [[] for _ in range(count)]
    # Python's sort keeps the order of equals: the first packed comes first.
    for place, index in enumerate(sorted(range(len(costs)), key=lambda index: -costs[index])):
        turn, group = divmod(place, count)
        groups[group if turn % 2 == 0 else count - 1 - group].append(index)
    return groups


def across_ranks(
    shards: list[Iterator[tuple[Rows, int]]],
    cost: tuple[float, float],
    window: int,
    seed: int | None,
    rows_of_a_rank: int,
    ranks: int,
    rank: int,
) -> Iterator[tuple[Rows, list[int]]]:
    """Yield the rows of one rank in each batch, and how many documents of each shard have been placed by then.

    The rows of all shards, which are those of all ranks, are dealt together: to steps by like cost, and the rows of a
    step to the ranks, back and forth.
    """
    number, placed, steps = 0, [0] * len(shards), 0
    coming: list[list[Row]] = [[] for _ in shards]
    dealt: list[list[tuple[int, Row]]] = []
    while True:
        while len(dealt) + steps < window:
            items = [next(packed, None) for packed in shards]
            if not any(items):
                break
            steps += 1
            for own, item in zip(coming, items, strict=True):
                own += [row for row in item[0] if row] if item else []
        if not dealt:
            if steps == 0:
                return
            rows = [(shard, row) for shard, own in enumerate(coming) for row in own]
            rows += [(0, [])] * (steps * rows_of_a_rank * ranks - len(rows))
            ranking = sorted(range(len(rows)), key=lambda index: -cost_of([rows[index][1]], cost))
            size = rows_of_a_rank * ranks
            dealt = [
                [rows[index] for index in sorted(ranking[step * size : (step + 1) * size])]
                for step in _order(steps, number, seed)
            ]
            coming, steps, number = [[] for _ in shards], 0, number + 1
        of_step, *dealt = dealt
        for shard, row in of_step:
            placed[shard] += len(lengths_in(row))
        group = _groups([cost_of([row], cost) for _, row in of_step], ranks)[rank]
        yield [of_step[index][1] for index in sorted(group)], placed


def _order(steps: int, number: int, seed: int | None) -> list[int]:
    """Return the order of the groups of window `number`, by a number drawn for each."""
    base = _mix(_mix(0 if seed is None else seed) ^ number)
    drawn = {step: _mix(base ^ step) for step in range(steps)}
    return sorted(drawn, key=lambda step: drawn[step])


def _mix(x: int) -> int:
    """Return the number that follows x in splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & BITS64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & BITS64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & BITS64
    return x ^ x >> 31
