"""Tokenize once, keep the words on the device, and train from there: each batch is a table of a few kilobytes.

    python examples/store_resident.py chats.jsonl --store tokens

The second run finds the store and tokenizes nothing. On the CPU the store is read as it is mapped.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch

import nanopack
from nanopack.attention import document_mask
from nanopack.demo import GPT, small_tokenizer
from nanopack.loss import weighted_loss
from nanopack.store.tokenize import tokenize

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("files", nargs="+")
parser.add_argument("--store", type=Path, default=Path("tokens"))
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

if not (args.store / "manifest.json").exists():
    tokenize(args.files, small_tokenizer(), args.store)
with nanopack.Loader(
    args.store, None, batch_size=4, seq_len=256, seed=1, resident=True, extras=("positions", "doc_ids")
) as loader:
    torch.manual_seed(0)
    model = GPT(loader.tokenizer.vocab_size).to(loader.device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for batch in islice(loader, args.steps):
        logits = model(batch.inputs, batch.positions, document_mask(batch.doc_ids))
        loss = weighted_loss(logits, batch.targets, batch.weights, batch.weight_sum)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {batch.step}, loss {loss.item():.4f}")
    stats = loader.stats()
    print(f"{stats['bytes_copied'] / max(1, stats['batches']):,.0f} bytes copied a batch")
