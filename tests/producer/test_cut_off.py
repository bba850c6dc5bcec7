"""A file that is cut off while it is mapped into memory: the error names it, in whatever process it was read."""

from __future__ import annotations

import faulthandler
import os
import sys
import time

import numpy as np
import pytest
from faulty import SMALL, TOKENIZER, within
from stores import store_of

from nanopack import Loader, ProducerError, StorageError
from nanopack.conversations.mapped import MappedFiles, cut_off
from nanopack.store.foreign import open_bin

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and SIGBUS as on Linux")
CHATS = [{"text": f"a b c d e f g {k}"} for k in range(20_000)]


def arrow(folder):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    path = folder / "chats.arrow"
    table = pa.Table.from_pylist(CHATS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    return path, path


def store(folder):
    out = folder / "store"
    store_of(out, CHATS[:2000], TOKENIZER, shard_documents=500, loss="all")
    return max(out.glob("*.words"), key=os.path.getsize), out


def ids(folder):
    path = folder / "ids.bin"
    np.resize(np.arange(300, dtype=np.uint16), 500_000).tofile(path)
    return path, open_bin(path, end_id=0, vocab_size=1000, bos_id=0)


class Mapped:
    """A data set of the user's own."""

    def __init__(self, path):
        self.rows = np.load(path, mmap_mode="r")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        # pytest's would print where each thread is
        faulthandler.disable()
        return {"text": bytes(self.rows[index]).decode()}


def of_the_user(folder):
    path = folder / "rows.npy"
    np.save(path, np.full((5000, 400), ord("a"), np.uint8))
    return path, Mapped(path)


CASES = [(make, workers) for make in (arrow, store, ids, of_the_user) for workers in (0, 1, 2)]
# code of the user's that reads in the trainer's own process is killed with it
CASES.remove((of_the_user, 0))


@pytest.mark.parametrize(("make", "workers"), CASES)
def test_a_mapped_file_that_is_cut_off_is_named_with_the_remedy(tmp_path, make, workers):
    path, data = make(tmp_path)
    with within(30), Loader(data, TOKENIZER, num_workers=workers, prefetch=1, **SMALL) as loader:
        next(loader)
        time.sleep(0.05)
        os.truncate(path, 0)
        with pytest.raises((StorageError, ProducerError), match=r"cut off.*copy it again") as raised:
            for _ in range(100_000):
                next(loader)
    assert str(path) in str(raised.value)
    assert workers or type(raised.value) is StorageError


def test_a_file_that_was_replaced_grown_or_deleted_is_not_cut_off(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.zeros(10_000))
    rows, files = np.load(path, mmap_mode="r"), MappedFiles([str(path)])

    def look():
        time.sleep(0.001)
        files.check()
        return [line for line in cut_off() if str(tmp_path) in line]

    with path.open("ab") as file:
        file.write(b"more")
    assert look() == []
    (tmp_path / "new").write_bytes(b"")
    os.replace(tmp_path / "new", path)
    assert look() == []
    path.unlink()
    assert look() == [] and not rows.any()


def test_the_files_that_are_cut_off_are_those_that_are_mapped_beyond_their_end(tmp_path):
    for name in ("whole", "cut", "also cut"):
        np.save(tmp_path / f"{name}.npy", np.zeros(10_000))
    kept = [np.load(path, mmap_mode="r") for path in tmp_path.glob("*.npy")]
    for name in ("cut", "also cut"):
        os.truncate(tmp_path / f"{name}.npy", 5000)
    found = {line for line in cut_off() if str(tmp_path) in line}
    assert found == {f"{tmp_path}/{name}.npy, which has 5,000 bytes left" for name in ("cut", "also cut")} and kept
