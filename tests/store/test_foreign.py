"""Files of Megatron-LM, llm.c, nanoGPT and Arrow are read in place as the data set of their documents, and written."""

from __future__ import annotations

import functools
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from data_sets import LARGE, PACKINGS, SHIPPED, SMALL
from stores import store_of

import nanopack
from nanopack import StorageError, cli, reference
from nanopack.store.arrow import open_arrow, to_arrow
from nanopack.store.export import export
from nanopack.store.foreign import open_bin, open_megatron
from nanopack.store.tokenize import tokenize
from nanopack.verify import compare

pa = pytest.importorskip("pyarrow")
Loader = functools.partial(nanopack.Loader, num_workers=0)
DOCUMENTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
EOT = 99
ARGUMENTS = dict(batch_size=2, seq_len=5, epochs=1)


def write_megatron(prefix: Path, sequences: list[list[int]], bounds: list[int], code: int = 8) -> Path:
    """As Megatron Core's IndexedDatasetBuilder writes it."""
    dtype = {4: np.int32, 8: np.uint16}[code]
    lengths = np.array([len(one) for one in sequences], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) * dtype().itemsize
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    Path(f"{prefix}.idx").write_bytes(
        index + lengths.tobytes() + pointers.tobytes() + np.array(bounds, np.int64).tobytes()
    )
    Path(f"{prefix}.bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    return prefix


def write_llmc(path: Path, ids: list[int], magic: int = 20240520) -> Path:
    header = np.zeros(256, np.int32)
    header[:3] = magic, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, np.uint16 if magic == 20240520 else np.uint32).tobytes())
    return path


def documents_of(store) -> list[list[int]]:
    return [store[i]["input_ids"].tolist() for i in range(len(store))]


def same_batches(store, records, **arguments) -> bool:
    arguments = {**ARGUMENTS, **arguments}
    with Loader(records, SMALL, **arguments) as loader, Loader(store, **arguments) as stored:
        return bool(compare(iter(loader), iter(stored)))


@pytest.mark.parametrize("code", [4, 8])
@pytest.mark.parametrize("packing", PACKINGS)
def test_megatron_documents_are_read_in_place(tmp_path, code, packing):
    prefix = write_megatron(tmp_path / "text_document", DOCUMENTS, [0, 1, 2, 3, 4], code)
    store = open_megatron(prefix, SMALL)
    assert documents_of(store) == DOCUMENTS and isinstance(store.shards[0], np.memmap)
    assert same_batches(store, [{"input_ids": ids} for ids in DOCUMENTS], packing=packing)
    arguments = {**ARGUMENTS, "packing": packing}
    assert compare(reference.batches(store, SMALL, **arguments), iter(Loader(store, SMALL, **arguments)))


def test_a_megatron_document_of_several_sentences_is_one_document_and_an_empty_one_none(tmp_path):
    prefix = write_megatron(tmp_path / "x", DOCUMENTS, [0, 2, 2, 4])
    for name in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        assert documents_of(open_megatron(name, SMALL)) == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


def test_what_is_wrong_with_megatron_files_is_named(tmp_path):
    prefix = write_megatron(tmp_path / "x", DOCUMENTS, [0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"x\.bin has id 14 at token 9, and ids go from 0 to 13"):
        open_megatron(prefix, vocab_size=14, bos_id=0)
    with pytest.raises(ValueError, match="pass the tokenizer, or vocab_size and bos_id"):
        open_megatron(prefix, vocab_size=14)
    data = Path(f"{prefix}.bin")
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(StorageError, match=r"x\.bin: expected 20 bytes, found 18"):
        open_megatron(prefix, SMALL)
    index = Path(f"{prefix}.idx")
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"x\.idx was cut"):
        open_megatron(prefix, SMALL)
    index.write_bytes(b"TNTIDX")
    with pytest.raises(ValueError, match=r"x\.idx is not an index of Megatron-LM"):
        open_megatron(prefix, SMALL)


def test_llmc_files_begin_their_documents_with_the_end_of_text_token(tmp_path):
    one = write_llmc(tmp_path / "1.bin", [EOT, 1, 2, EOT, 3])
    other = write_llmc(tmp_path / "2.bin", [EOT, 70_000], 20240801)
    assert documents_of(open_bin(one, SMALL, begin_id=EOT)) == [[EOT, 1, 2], [EOT, 3]]
    store = open_bin([one, other], LARGE, begin_id=EOT)
    assert documents_of(store) == [[EOT, 1, 2], [EOT, 3], [EOT, 70_000]]
    assert store.where(2) == f"{other} document 2"
    assert documents_of(pickle.loads(pickle.dumps(store))) == documents_of(store)
    other.write_bytes(other.read_bytes() + b"\0")
    with pytest.raises(StorageError, match=r"2\.bin: expected 1,032 bytes, found 1,033"):
        open_bin([one, other], LARGE, begin_id=EOT)


def test_nanogpt_files_end_their_documents_with_it(tmp_path):
    path = tmp_path / "train.bin"
    np.array([1, 2, EOT, 3, EOT, EOT, 4], np.uint16).tofile(path)
    store = open_bin(path, SMALL, end_id=EOT)
    assert documents_of(store) == [[1, 2, EOT], [3, EOT], [EOT], [4]]
    assert same_batches(store, [{"input_ids": ids} for ids in documents_of(store)], packing="stream", seed=2)
    with pytest.raises(ValueError, match="pass one, which ends or begins each document"):
        open_bin(path, SMALL)


RECORDS = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
    {"input_ids": [4, 5, 0], "labels": [4, -100, -100], "attention_mask": [1, 1, 0]},
    {"input_ids": [6], "labels": [6], "attention_mask": [1]},
]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("columns", [["input_ids"], ["input_ids", "labels", "attention_mask"]])
def test_a_saved_dataset_is_read_in_place_as_its_records(tmp_path, packing, columns):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    records = [{name: record[name] for name in columns} | {"weight": i} for i, record in enumerate(RECORDS)]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved", num_shards=2)
    saved = datasets.load_from_disk(tmp_path / "saved")
    for data in (tmp_path / "saved", saved):
        store = open_arrow(data, SMALL)
        assert same_batches(store, records, packing=packing, loss_weights="token")
        assert same_batches(pickle.loads(pickle.dumps(store)), records, packing=packing)
    with pytest.raises(ValueError, match="call flatten_indices"):
        open_arrow(saved.select([1, 0]), SMALL)


@pytest.mark.parametrize("kind", [pa.list_(pa.uint16()), pa.large_list(pa.int64()), pa.list_(pa.int32(), 2)])
def test_ids_of_any_list_type_and_of_a_slice_are_arrows_own_buffers(kind):
    table = pa.table({"input_ids": pa.array([[0, 0], [1, 2], [3, 4], [5, 6]], kind)}).slice(1, 2)
    store = open_arrow(table, SMALL)
    assert documents_of(store) == [[1, 2], [3, 4]]
    (buffers,) = (table.column("input_ids").chunk(0).buffers(),)
    assert store.shards[0].ctypes.data - buffers[-1].address == 2 * store.shards[0].itemsize


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"labels": [[-100, 2, 9], [4], [6]]}, "row 0: labels has neither -100 nor the id"),
        ({"loss_mask": [[0, 1, 1], [2], [1]]}, "row 1: loss_mask must be bools or 0 and 1"),
        ({"loss_mask": [[0, 1, 1], [1], [1]], "labels": [[1, 2, 3], [4], [6]]}, "row 0: loss_mask and labels contra"),
        ({"loss_mask": [[0, 1], [1], [1]]}, "row 0: loss_mask and input_ids have not the same length"),
        ({"attention_mask": [[1, 1, 1], [0], [1]]}, "row 1: no token is left"),
        ({"position_ids": [[0, 1, 2], [0], [0]]}, "position_ids, which is not read here"),
        ({"input_ids": [[1.5], [4.0], [6.0]]}, "hold double|hold float64"),
    ],
)
def test_what_is_wrong_with_arrow_data_is_named(change, why):
    table = pa.table({"input_ids": [[1, 2, 3], [4], [6]], **change})
    with pytest.raises(ValueError, match=why):
        open_arrow(table, SMALL)


def test_a_store_is_an_arrow_table_in_one_call_and_a_dataset_in_two(tmp_path):
    store = store_of(tmp_path, [{"text": "ab", "weight": 2}, {"input_ids": [1, 2], "loss_mask": [0, 1]}], SMALL, 1)
    table = to_arrow(store)
    assert table.to_pylist() == [
        {name: value.tolist() if hasattr(value, "tolist") else value for name, value in store[i].items()}
        for i in range(2)
    ]
    datasets = pytest.importorskip("datasets")
    assert datasets.Dataset(table)[1] == table.to_pylist()[1]


@pytest.mark.parametrize("tokenizer", [SMALL, LARGE])
def test_what_is_exported_is_read_again_with_the_same_documents(tmp_path, tokenizer, capsys):
    store = tokenize(SHIPPED, tokenizer, tmp_path / "out", num_workers=0)
    for to in ("megatron", "llmc", "arrow"):
        code = cli.main(["store", "export", str(tmp_path / "out"), str(tmp_path / to), "--to", to, "--json"])
        assert code == 0 and all(map(os.path.exists, json.loads(capsys.readouterr().out)["written"]))
    bos = store.bos_id
    again = open_megatron(tmp_path / "megatron", tokenizer), open_bin(tmp_path / "llmc.bin", tokenizer, begin_id=bos)
    for other in again:
        assert np.array_equal(other.lengths, store.lengths)
        assert np.array_equal(other.shards[0], np.concatenate(store.shards) & np.uint32(store.loss_bit - 1))
    arrow = open_arrow(tmp_path / "arrow.arrow", tokenizer)
    assert np.array_equal(arrow.shards[0], np.concatenate(store.shards))
    assert np.array_equal(arrow.loss_tokens, store.loss_tokens)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="to='csv' is not allowed; use one of 'megatron', 'llmc', 'arrow'"):
        export(store_of(tmp_path, [{"text": "a"}], SMALL), tmp_path / "x", "csv")


@pytest.mark.parametrize("tokenizer", [SMALL, LARGE])
def test_megatrons_own_reader_has_the_same_documents(tmp_path, tokenizer):
    """A witness: megatron-core need not be installed; MEGATRON_CORE names a folder that holds it."""
    sys.path[:0] = [folder for folder in [os.environ.get("MEGATRON_CORE")] if folder]
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    store = store_of(tmp_path / "out", [{"text": "ab"}, {"text": "c"}, {"text": "def"}], tokenizer)
    export(store, tmp_path / "x", "megatron")
    theirs = module.IndexedDataset(str(tmp_path / "x"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents_of(store)
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]
    builder = module.IndexedDatasetBuilder(str(tmp_path / "y.bin"), dtype=np.uint16)
    builder.add_document([1, 2, 3], [2, 1])
    builder.add_document([4, 5], [2])
    builder.finalize(str(tmp_path / "y.idx"))
    assert documents_of(open_megatron(tmp_path / "y", tokenizer)) == [[1, 2, 3], [4, 5]]
