"""A mixture of thousands of files is read under a small limit of open files, in the trainer and in its processes."""

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
