"""What a rank of `torchrun` trains on from a token store: python store_ranks.py STORE OUT writes OUT/RANK.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from nanopack import Loader

dist.init_process_group("gloo")
rank, pieces, batches = dist.get_rank(), [], 0
with Loader(sys.argv[1], batch_size=2, seq_len=512, epochs=1, seed=1) as loader:
    expected = len(loader)
    for batch in loader:
        batches += 1
        pieces += [(p.conversation, p.offset, p.length) for row in batch.word_pieces for p in row]
    ledger = loader.ledger()
found = {
    "read": ledger["conversations"]["read"],
    "balanced": ledger["balanced"],
    "world": dist.get_world_size(),
    "batches": batches,
    "expected": expected,
    "pieces": pieces,
}
(Path(sys.argv[2]) / f"{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
