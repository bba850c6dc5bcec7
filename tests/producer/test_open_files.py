"""Thousands of files and row groups are read under a small limit of open files, in the trainer and its processes."""

from __future__ import annotations

import sys

import pytest
from trainer_script import script

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits as on Linux")

MIXED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from pathlib import Path
sources = []
for number in range(20):
    folder = Path(__file__).with_name(f"source{number}")
    folder.mkdir()
    for file in range(200):
        (folder / f"{file:03}.jsonl").write_text(f'{{"text": "a {number} {file}"}}')
    sources.append((str(folder), 1, f"source{number}"))
for workers in (0, 2):
    mixed = nanopack.mixture(sources)
    arguments = dict(batch_size=8, seq_len=64, packing="pad", loss="all", epochs=1, seed=1, num_workers=workers)
    with nanopack.Loader(mixed, "chat32k", **arguments) as loader:
        print(sum(len(row) for batch in loader for row in batch.pieces), flush=True)
"""


def test_a_mixture_of_thousands_of_files_is_read_under_a_limit_of_256(tmp_path):
    with script(tmp_path, MIXED) as trainer:
        out, err = trainer.communicate(timeout=100)
    assert (trainer.returncode, err) == (0, "") and out.split() == ["4000", "4000"]


SHUFFLED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import pyarrow as pa
import pyarrow.parquet as pq
from pathlib import Path
paths = []
for number in range(3):
    paths.append(str(Path(__file__).with_name(f"{number}.parquet")))
    pq.write_table(pa.table({"text": [f"a {number} {row}" for row in range(600)]}), paths[-1], row_group_size=4)
arguments = dict(batch_size=8, seq_len=64, packing="pad", loss="all", epochs=1, seed=1)
for workers in (0, 2):
    for data in (paths, nanopack.mixture([(path, 1) for path in paths])):
        with nanopack.Loader(data, "chat32k", num_workers=workers, **arguments) as loader:
            print(sum(len(row) for batch in loader for row in batch.pieces), flush=True)
"""


def test_hundreds_of_row_groups_are_shuffled_under_a_limit_of_64(tmp_path):
    pytest.importorskip("pyarrow")
    with script(tmp_path, SHUFFLED) as trainer:
        out, err = trainer.communicate(timeout=100)
    assert (trainer.returncode, err) == (0, "") and out.split() == ["1800"] * 4
