"""Train with DistributedDataParallel and gradient accumulation; started again, it resumes from its last checkpoint.

    torchrun --nproc-per-node=2 examples/ddp.py chats.jsonl

The loss is divided by the targets of the whole step, over micro-batches and ranks; nanopack.loss says why. A checkpoint
holds the loaders' states of all ranks. With shard="row" another number of ranks may resume it, if batch_size changes so
that the rows of all ranks stay as many.
"""

import argparse
import os
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import nanopack
from nanopack.attention import document_mask
from nanopack.demo import GPT, small_tokenizer
from nanopack.loss import total_weight, weighted_loss

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("files", nargs="+")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
args = parser.parse_args()

dist.init_process_group()
rank, world_size, local_rank = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"])
device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
how = {"shard": "row", "seed": 1, "device": device, "extras": ("positions", "doc_ids")}
with nanopack.Loader(args.files, small_tokenizer(), 8 // world_size, 256, **how) as loader:
    torch.manual_seed(0)
    model = GPT(loader.tokenizer.vocab_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    done = 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, map_location=device)
        for name, part in (("model", model), ("optimizer", optimizer), ("loader", loader)):
            part.load_state_dict(saved[name])
        done = saved["step"]
    parallel = DistributedDataParallel(model)
    for step in range(done, args.steps):
        batches = list(islice(loader, args.accumulate))
        total = total_weight(batches)
        loss = torch.zeros((), device=device)
        for batch in batches:
            logits = parallel(batch.inputs, batch.positions, document_mask(batch.doc_ids))
            part = weighted_loss(logits, batch.targets, batch.weights, total)
            # DDP takes the mean over the ranks
            (part * world_size).backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}, loss {loss.item():.6f}", flush=True)
    states = [None] * world_size
    dist.all_gather_object(states, loader.state_dict())
    if rank == 0:
        state = {"step": args.steps, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "loader": nanopack.merge_states(states)}, args.checkpoint)
dist.destroy_process_group()
