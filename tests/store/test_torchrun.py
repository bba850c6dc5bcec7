"""The two-node example of docs/store.md, as two agents of torchrun on this machine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from data_sets import SHIPPED, SMALL

from nanopack.store.tokenize import tokenize

SCRIPT = Path(__file__).parents[1] / "support" / "store_ranks_run.py"


@pytest.mark.slow
def test_the_ranks_of_two_agents_share_a_store_and_end_together(tmp_path):
    store = tokenize(SHIPPED, SMALL, tmp_path / "tokens", num_workers=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"),
                *("--node_rank", str(node), "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"),
                *("--local_addr", "localhost", str(SCRIPT), str(tmp_path / "tokens"), str(tmp_path)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    ended = [(agent.communicate(timeout=200)[1], agent.returncode) for agent in agents]
    assert [code for _, code in ended] == [0, 0], ended
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert {rank["world"] for rank in ranks} == {4}
    assert len({rank["batches"] for rank in ranks} | {rank["expected"] for rank in ranks}) == 1
    # every document was read by one rank alone; a long one may be cut to a row without a target, and dropped
    assert sum(rank["read"] for rank in ranks) == len(store) and all(rank["balanced"] for rank in ranks)
    read = Counter(document for rank in ranks for document, _, _ in rank["pieces"])
    assert set(read.values()) == {1} and len(read) > 0.9 * len(store)
