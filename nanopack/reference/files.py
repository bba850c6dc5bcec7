"""The slow packer's files: read whole, cut into records of whatever shape.

    conversations   ->   open_records()   ->   each record's location, and a function that reads it   ->   records.py

A part of the definition. It shares nothing with the fast path. A broken line fails when its turn comes.
"""

from __future__ import annotations

import codecs
import copy
import glob
import gzip
import hashlib
import io
import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanopack.reference.stored import is_stored, stored_records

Stored = tuple[str, Callable[[], object]]


def open_records(conversations: Any, seed: int | None = None) -> list[Stored]:
    """For every conversation its location, for errors, and a function that reads it; `seed` is the loader's."""
    paths = [conversations] if isinstance(conversations, (str, os.PathLike)) else conversations
    if isinstance(paths, (list, tuple)) and paths and isinstance(paths[0], (str, os.PathLike)):
        if len(paths) == 1 and is_stored(os.fspath(paths[0])):
            return stored_records(os.fspath(paths[0]))
        return [record for path in paths for file in _files(os.fspath(path)) for record in _file(file)]
    if type(conversations).__name__ == "Series":
        # by position, not by label
        conversations = list(conversations)
    if isinstance(conversations, dict):
        raise ValueError("conversations is one dict")
    read = conversations.__getitem__
    whole = conversations
    # torch's Subset has a dataset, its ConcatDataset several
    while type(whole).__module__.startswith("torch.utils.data") and {"dataset", "datasets"} & {*vars(whole)}:
        whole = whole.dataset if hasattr(whole, "dataset") else whole.datasets[0]
    if type(whole).__module__.startswith("datasets."):
        held = whole
        # ds["messages"]
        while type(held).__name__ == "Column":
            held = held.source
        if held.format["type"] != "custom":
            read = partial(_read_without_nulls, conversations, whole.features)
    own = conversations.objects() if type(conversations).__module__ == "nanopack.mixture" else _nested(conversations)
    return [(f"conversation {index}", partial(_drawn, read, index, seed, own)) for index in range(len(conversations))]


def _nested(data: Any) -> list[object]:
    """A data set and those within it: torch's Subset has a dataset, its ConcatDataset several."""
    is_torchs = type(data).__module__.startswith("torch.utils.data")
    inner = [*getattr(data, "datasets", []), *([data.dataset] if hasattr(data, "dataset") else [])] if is_torchs else []
    return [data, *(one for each in inner for one in _nested(each))]


def _drawn(read: Callable[[int], object], index: int, seed: int | None, own: list[object]) -> object:
    """A record of a data set that may draw random numbers: its index and the seed decide which."""
    number = int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest(), "big")
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    generators = _generators(own)
    kept = copy.deepcopy([_state_of(one) for one in generators])
    try:
        record = _seeded(read, index, number, generators)
        # one that the data set makes when it first reads was not seeded
        return record if len(generators) == len(_generators(own)) else _seeded(read, index, number, _generators(own))
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])
        for generator, state in zip(generators, kept, strict=True):
            _set_state(generator, state)


def _generators(own: list[object]) -> list[Any]:
    """The generators of random numbers that data sets keep as attributes."""
    attributes = [value for data in own for value in getattr(data, "__dict__", {}).values()]
    kinds = (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)
    return [value for value in attributes if isinstance(value, kinds) and type(value) is not random.SystemRandom]


def _seeded(read: Callable[[int], object], index: int, number: int, generators: list[Any]) -> object:
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
    for place, generator in enumerate(generators):
        _seed(generator, (number + place + 1) % 2**64)
    return read(index)


def _seed(generator: Any, number: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(number)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(number).state
    else:
        generator.seed(number % 2**32 if isinstance(generator, np.random.RandomState) else number)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _files(path: str) -> list[str]:
    # A file whose name looks like a pattern is that file.
    path = path if os.path.exists(path) else os.path.expanduser(path)
    if os.path.exists(path):
        found = [path]
    else:
        # So are the folders before the pattern.
        folder = next((str(folder) for folder in Path(path).parents if folder.exists()), "")
        found = sorted(glob.glob(path.replace(folder, glob.escape(folder), 1), recursive=True))
    if not found:
        raise ValueError(f"conversations={path!r}: no such file. Pass a path or a pattern that matches.")
    return [file for path in found for file in (_folder(Path(path)) if os.path.isdir(path) else [path])]


def _folder(folder: Path) -> list[str]:
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        # A saved Dataset says which files are its own, in order.
        listed = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        return [str(folder / file["filename"]) for file in listed]
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name[0] not in "._")
    notes = ["dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json"]
    return [str(folder / name) for name in names if _kind(name) and name not in notes]


def _kind(path: str) -> str:
    """The kind of a file by its name; "" where that is unknown."""
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    text = [kind for kind in ("jsonl", "ndjson", "json") if name.endswith(f".{kind}")]
    return (text or [kind for kind in ("parquet", "arrow") if path.lower().endswith(f".{kind}")] or [""])[0]


def _file(path: str) -> list[Stored]:
    kind = _kind(path)
    if kind in ("parquet", "arrow"):
        return [(f"{path} row {index}", partial(dict, row)) for index, row in enumerate(_rows(path, kind))]
    if not kind:
        raise ValueError(f"conversations={path!r}: unknown kind. Pass files of JSON, Parquet or Arrow.")
    data = Path(path).read_bytes()
    if path.lower().endswith(".gz"):
        data = gzip.decompress(data)
    if path.lower().endswith(".zst"):
        import zstandard

        with zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(data, read_across_frames=True) as stream:
            data = stream.read()
    data = data.removeprefix(codecs.BOM_UTF8)
    if kind == "json" and data.lstrip().startswith(b"["):
        return [(f"{path} element {k}", partial(_parse, part)) for k, part in enumerate(_elements(path, data))]
    numbered = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    return [(f"{path}:{number}", partial(_parse, line)) for number, line in numbered]


def _parse(line: bytes) -> object:
    # Decoded here: json.loads would guess at UTF-16 too.
    return json.loads(line.decode())


def _elements(path: str, data: bytes) -> list[bytes]:
    """The elements of a JSON array, found byte by byte."""
    elements, depth, in_string, backslashes, begin = [], 0, False, 0, 0
    for index, byte in enumerate(data):
        char = chr(byte)
        if char == '"' and backslashes % 2 == 0:
            in_string = not in_string
        backslashes = backslashes + 1 if char == "\\" else 0
        if in_string:
            continue
        depth += (char in "[{") - (char in "]}")
        if char in "[{" and depth == 1:
            begin = index + 1
        elif (char == "," and depth == 1) or (char in "]}" and depth == 0):
            elements.append(data[begin:index])
            begin = index + 1
        if char in "]}" and depth == 0:
            if data[begin:].strip(b" \t\r\n"):
                raise ValueError(f"{path}: something follows the array.")
            return [] if len(elements) == 1 and not elements[0].strip(b" \t\r\n") else elements
    raise ValueError(f"{path}: the array does not end.")


def _rows(path: str, kind: str) -> list[dict[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet

    if kind == "parquet":
        table = pyarrow.parquet.read_table(path)
    else:
        data = Path(path).read_bytes()
        opened = pa.ipc.open_file if data.startswith(b"ARROW1") else pa.ipc.open_stream
        table = opened(io.BytesIO(data)).read_all()
    types = {field.name: field.type for field in table.schema}
    return [{name: _from_arrow(value, types[name]) for name, value in row.items()} for row in table.to_pylist()]


def _from_arrow(value: Any, kind: Any) -> Any:
    """An Arrow value as JSON would have it: structs lose the null fields that other rows of the column brought."""
    import pyarrow as pa

    if value is None:
        return None
    if "arrow.json" in str(kind) and not pa.types.is_nested(kind):
        return json.loads(value)
    if pa.types.is_struct(kind):
        kinds = {field.name: field.type for field in kind}
        return {name: _from_arrow(item, kinds[name]) for name, item in value.items() if item is not None}
    if pa.types.is_map(kind):
        return {key: _from_arrow(item, kind.item_type) for key, item in value}
    return [_from_arrow(item, kind.value_type) for item in value] if isinstance(value, list) else value


def _read_without_nulls(records: Any, features: Any, index: int) -> Any:
    return _without_nulls(records[index], features)


def _without_nulls(value: Any, feature: Any) -> Any:
    """A value of a Dataset without the nulls that Arrow put into its structs."""
    if type(feature).__name__ == "Json" or not isinstance(value, (dict, list)):
        return value
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    if isinstance(value, list):
        return [_without_nulls(item, inner) for item in value]
    fields = inner if isinstance(inner, dict) else {}
    return {key: _without_nulls(item, fields.get(key)) for key, item in value.items() if item is not None}
