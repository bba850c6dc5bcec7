"""Read tokens that lie in Arrow: a datasets.Dataset, its folder, .arrow files, a pyarrow.Table; give a store as one.

    input_ids alone          ->   open_arrow()   ->   ForeignDocuments, whose ids are Arrow's own buffers
    input_ids and a mask     ->   open_arrow()   ->   the same, with words in a temporary file, made column by column
    Store                    ->   to_arrow()     ->   a pyarrow.Table with input_ids and loss_mask

No Python object is made for a token or a document.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from nanopack.conversations.files import files_in
from nanopack.conversations.tokens import BOUNDS, LOSS_MASKS, NOT_IN_LOSS, SEGMENTS
from nanopack.errors import short
from nanopack.store.foreign import ForeignDocuments, check_ids, settings_for
from nanopack.store.store import Documents

# Columns that decide something that is not read here.
NOT_READ = (*BOUNDS, *SEGMENTS, "position_ids")
ROWS = 1 << 12


def open_arrow(
    data: Any, tokenizer: Any = None, *, vocab_size: int | None = None, bos_id: int | None = None, check: bool = True
) -> Documents:
    """Open a datasets.Dataset, a folder that it was saved in, an .arrow file or a pyarrow.Table with input_ids.

    Masks are as of any record (docs/data.md): labels, loss_mask, assistant_masks, completion_mask, response_mask; of
    several, all must agree. Tokens whose attention_mask is 0 are removed. The rest as `open_megatron`.
    """
    settings = settings_for(tokenizer, vocab_size, bos_id)
    table, files = _table(data)
    names = [name for name in table.column_names if table.column(name).null_count < len(table)]
    if "input_ids" not in names:
        raise ValueError(f"{short(data)} has the columns {', '.join(table.column_names)}, but not input_ids")
    if wrong := [name for name in NOT_READ if name in names]:
        raise ValueError(f"{short(data)} has {wrong[0]}, which is not read here; give it to Loader as a data set")
    masks = [name for name in (*LOSS_MASKS, "labels", "attention_mask") if name in names]
    parts = [_flat(table.column("input_ids"), at) for at in range(table.column("input_ids").num_chunks)]
    parts = [(ids, lengths) for ids, lengths in parts if len(lengths)]
    for ids, _ in parts if check else ():
        check_ids(files[0] if files else "Arrow table", ids, settings.vocab_size)
    opened_by = (_reopen, data, settings.vocab_size, settings.bos_id)
    documents = ForeignDocuments(
        opened_by, files, [ids for ids, _ in parts], [lengths for _, lengths in parts], settings
    )
    weights = table.column("weight").fill_null(1).to_numpy().astype(np.float64) if "weight" in names else None
    if weights is not None and not (weights == 1).all():
        documents.weights = weights
    # what has no weight is out of the loss
    if masks or (weights is not None and not weights.all()):
        _mark(documents, table, masks)
    return documents


def _reopen(data: Any, vocab_size: int, bos_id: int) -> Documents:
    return open_arrow(data, vocab_size=vocab_size, bos_id=bos_id, check=False)


def _table(data: Any) -> tuple[Any, list[str]]:
    """Return the data as a pyarrow.Table, and the files in which they lie."""
    arrow = _pyarrow()
    if isinstance(data, arrow.Table):
        return data, []
    if isinstance(data, (str, os.PathLike)):
        path = os.fspath(data)
        files = files_in(path) if os.path.isdir(path) else [path]
        return arrow.concat_tables([_mapped(arrow, file) for file in files]), files
    held = getattr(getattr(data, "data", None), "table", None)
    if not isinstance(held, arrow.Table):
        raise ValueError(f"{short(data)} is no datasets.Dataset, pyarrow.Table, .arrow file or folder of them")
    if data._indices is not None:
        raise ValueError("the Dataset was shuffled or selected from: call flatten_indices(), or give it to Loader")
    return held, [file["filename"] for file in data.cache_files]


def _mapped(arrow: Any, file: str) -> Any:
    mapped = arrow.memory_map(file)
    whole = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    return (arrow.ipc.open_file(mapped) if whole else arrow.ipc.open_stream(mapped)).read_all()


def _flat(column: Any, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of a chunk of lists, end to end and not copied, and the lengths of the lists, int64."""
    chunk = column.chunk(number)
    if chunk.null_count:
        raise ValueError("a row of the Arrow data lacks its tokens or its mask; remove it")
    values = chunk.flatten().to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "iub":
        raise ValueError(f"the Arrow data hold {values.dtype}; ids and masks are whole numbers or bools")
    lengths = importlib.import_module("pyarrow.compute").list_value_length(chunk).to_numpy(zero_copy_only=False)
    return values, lengths.astype(np.int64)


def _mark(documents: ForeignDocuments, table: Any, masks: list[str]) -> None:
    """Give the documents words with the loss bit, in a file without a name, and what follows from the masks."""
    found, bit = [*_masked(table, masks, documents.weights)], documents.word_dtype.type(documents.loss_bit)
    with tempfile.TemporaryFile() as file:
        for ids, mask, _ in found:
            words = ids.astype(documents.word_dtype)
            words |= np.multiply(mask, bit, dtype=words.dtype)
            file.write(words.data)
        file.flush()
        documents.shards, documents.files = [np.memmap(file, documents.word_dtype, "r")], None
    lengths = np.concatenate([lengths for _, _, lengths in found])
    mask = np.concatenate([mask for _, mask, _ in found])
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    documents.all_in_loss = False
    documents.shard_documents = np.array([0, len(lengths)], np.int64)
    documents.lengths = lengths.astype(np.uint32)
    documents.loss_tokens = np.add.reduceat(mask, begins, dtype=np.int64).astype(np.uint32)
    documents.first_in_loss = mask[begins]


def _masked(
    table: Any, masks: list[str], weights: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the ids, whether each is in the loss, and the lengths, of some rows at a time."""
    for at in range(0, len(table), ROWS):
        rows = table.slice(at, ROWS).combine_chunks()
        ids, lengths = _flat(rows.column("input_ids"), 0)
        columns = {}
        for name in masks:
            values, its_lengths = _flat(rows.column(name), 0)
            if not np.array_equal(its_lengths, lengths):
                row = at + int(np.argmax(its_lengths != lengths))
                raise ValueError(f"row {row}: {name} and input_ids have not the same length; give one for each")
            columns[name] = values
        ids, mask, lengths = _agreed(ids, lengths, columns, at)
        if weights is not None:
            mask &= np.repeat(weights[at : at + ROWS] != 0, lengths)
        yield ids, mask, lengths


def _agreed(
    ids: np.ndarray, lengths: np.ndarray, columns: dict[str, np.ndarray], at: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens that stay, which are in the loss, and the lengths; ValueError where masks contradict."""
    keep = columns.pop("attention_mask", np.ones(len(ids), bool)).astype(bool)
    row_of = np.repeat(np.arange(at, at + len(lengths)), lengths)
    said: dict[str, np.ndarray] = {}
    for name, values in columns.items():
        if name == "labels":
            wrong = keep & (values != NOT_IN_LOSS) & (values != ids)
            _refuse(wrong, row_of, "labels has neither -100 nor the id at its place; labels must not be shifted")
            said[name] = values != NOT_IN_LOSS
        else:
            _refuse((values != 0) & (values != 1), row_of, f"{name} must be bools or 0 and 1")
            said[name] = values.astype(bool)
    mask = next(iter(said.values()), np.ones(len(ids), bool))
    for name, other in said.items():
        _refuse(keep & (mask != other), row_of, f"{next(iter(said))} and {name} contradict each other")
    kept = np.bincount(row_of[keep] - at, minlength=len(lengths))
    _refuse(kept == 0, np.arange(at, at + len(lengths)), "no token is left; remove it")
    return ids[keep], mask[keep], kept


def _refuse(wrong: np.ndarray, row_of: np.ndarray, what: str) -> None:
    if wrong.any():
        raise ValueError(f"row {int(row_of[np.argmax(wrong)])}: {what}")


def to_arrow(store: Documents) -> Any:
    """Return a store as a pyarrow.Table with input_ids (list of uint16 or uint32) and loss_mask (list of bool).

    With a column weight where one is not 1. `datasets.Dataset(to_arrow(store))` is the Dataset.
    """
    arrow = _pyarrow()
    tables = []
    for number, words in enumerate(store.shards):
        first, last = store.shard_documents[number], store.shard_documents[number + 1]
        offsets = arrow.array(np.concatenate([[0], np.cumsum(store.lengths[first:last], dtype=np.int64)]))
        bit = store.word_dtype.type(store.loss_bit)
        ids = words.astype(store.word_dtype) if store.all_in_loss else words & ~bit
        mask = np.ones(len(words), bool) if store.all_in_loss else words >= bit
        columns = {
            name: arrow.LargeListArray.from_arrays(offsets, arrow.array(values))
            for name, values in (("input_ids", ids), ("loss_mask", mask))
        }
        if store.weights is not None:
            columns["weight"] = arrow.array(np.asarray(store.weights[first:last]))
        tables.append(arrow.table(columns))
    return arrow.concat_tables(tables)


def _pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError("Arrow data need pyarrow; pip install nanopack-gpu[parquet]") from error
