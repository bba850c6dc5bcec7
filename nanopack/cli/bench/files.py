"""What does it cost to read conversations from files in shuffled order, and to keep them compressed?

    chats   ->   a file of each kind   ->   a pass in order and one shuffled   ->   tokens per second, their ratio

In this process, in seconds of processor time, from the opening of the file to the end of the pass: what has no random
access is unpacked meanwhile, and that counts.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nanopack.cli.bench.corpus import ROW, ROWS, Chat, Data
from nanopack.cli.bench.rounds import (
    Measure,
    Number,
    Pace,
    Result,
    Spread,
    Table,
    in_rounds,
    not_measured,
    ratio,
    spreads,
)
from nanopack.loader import Loader

CHATS = 20_000
SEED = 8579
KINDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet, groups of 1,000", "4 x .parquet, one group each")
NEEDS = {".zst": ("zstandard", "zstd"), ".parquet": ("pyarrow", "parquet")}
"""The package that writes a kind, and the extra that brings it."""


def measure(data: Data, pace: Pace) -> list[Table]:
    """Return a table with the speed of each kind of file in order and shuffled."""
    times = 1 if pace.quick else -(-CHATS // len(data.chats))
    chats = [as_text(chat) for chat in data.chats] * times
    with tempfile.TemporaryDirectory() as folder:
        measures: dict[str, Measure[float]] = {}
        absent = []
        for number, kind in enumerate(KINDS):
            if why := missing(kind):
                absent.append(not_measured(kind, why))
                continue
            pace.show(f"writing {kind}")
            paths = write(kind, chats, Path(folder) / str(number))
            measures[f"{kind}, in order"] = partial(_a_pass, data, paths, None)
            measures[f"{kind}, shuffled"] = partial(_a_pass, data, paths, SEED)
        measured = spreads(in_rounds(measures, pace))
    rows = [_row(kind, measured) for kind in KINDS if f"{kind}, shuffled" in measured]
    return [Table(f"A pass over {len(chats):,} chats from files, in processor time", [*rows, *absent])]


def _row(kind: str, measured: Mapping[str, Spread]) -> Result:
    in_order, shuffled = measured[f"{kind}, in order"], measured[f"{kind}, shuffled"]
    numbers: dict[str, Number] = {
        "in_order_tokens_per_s": in_order,
        "shuffled_tokens_per_s": shuffled,
        "shuffled_to_in_order_x": ratio(shuffled, in_order),
        "in_order_to_jsonl_x": ratio(in_order, measured[f"{KINDS[0]}, in order"]),
    }
    return Result(kind, numbers)


def as_text(chat: Chat) -> Chat:
    """Return the chat with the parts of a message put together: a column of Parquet has one type."""
    messages = []
    for message in chat["messages"]:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        messages.append({"role": message["role"], "content": text})
    return {"messages": messages}


def missing(kind: str) -> str:
    """Return why a kind cannot be measured here, or nothing."""
    for ending, (package, extra) in NEEDS.items():
        if ending in kind and importlib.util.find_spec(package) is None:
            return f"{package} is not installed; pip install nanopack-gpu[{extra}]"
    return ""


def write(kind: str, chats: Sequence[Chat], base: Path) -> list[str]:
    """Write the chats as files of this kind, whose paths begin with `base`; return their paths."""
    if ".parquet" in kind:
        shards = 4 if kind.startswith("4 x") else 1
        size = -(-len(chats) // shards)
        parts = [chats[start : start + size] for start in range(0, len(chats), size)]
        return [
            _write_parquet(part, Path(f"{base}-{n}.parquet"), 1000 if shards == 1 else size)
            for n, part in enumerate(parts)
        ]
    text = "".join(json.dumps(chat) + "\n" for chat in chats).encode()
    path = Path(f"{base}{kind}")
    path.write_bytes(_COMPRESS.get(path.suffix, bytes)(text))
    return [str(path)]


def _zstd(text: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(text)


_COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": partial(gzip.compress, compresslevel=6), ".zst": _zstd}


def _write_parquet(chats: Sequence[Chat], path: Path, group: int) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(chats)), path, row_group_size=group)
    return str(path)


def _a_pass(data: Data, paths: list[str], seed: int | None, _: float) -> float:
    """Return tokens per second of processor time over one pass, its opening included."""
    began, tokens = time.process_time(), 0
    settings: dict[str, Any] = {
        "max_document_tokens": ROW,
        "epochs": 1,
        "seed": seed,
        "num_workers": 0,
        "device": "cpu",
    }
    with Loader(paths, data.tokenizer, ROWS, ROW, **settings) as batches:
        for batch in batches:
            tokens += batch.num_tokens
    return tokens / (time.process_time() - began)
