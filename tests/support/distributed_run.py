"""Train a tiny transformer as one would under torchrun, to be killed and resumed: see test_distributed.py.

    python -m torch.distributed.run --nproc-per-node=2 tests/support/distributed_run.py FOLDER
    python tests/support/distributed_run.py FOLDER 240    (one process; 240 steps and not 50)

For each step a line with the loss goes to FOLDER/losses; checkpoints go to FOLDER/checkpoint, from which a new run goes
on, on as many ranks as it has; the weights come last, to FOLDER/weights. Losses and weights are the same bits on any
number of ranks: each row of the global batch has a gradient of its own, and every rank sums all of them in one order.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from data_sets import SHIPPED, byte_tokenizer
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import nanopack

STEPS, SAVE_EVERY, GLOBAL_ROWS, SEQ_LEN = 50, 4, 8, 96
# One token per byte: the model stays tiny.
BYTES = byte_tokenizer()


class Model(nn.Module):
    """One layer, learned positions, 45 thousand parameters; a piece sees itself alone."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(BYTES.n_vocab, width)
        self.positions = nn.Embedding(SEQ_LEN, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, inputs, positions, doc_ids):
        x = self.tokens(inputs) + self.positions(positions)
        q, k, v = self.qkv(self.norms[0](x)).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        sees = (doc_ids[:, None] == doc_ids[None]).tril()
        x = x + self.out(scaled_dot_product_attention(q, k, v, sees).transpose(0, 1).flatten(1))
        x = x + self.mlp(self.norms[1](x))
        return self.norms[2](x) @ self.tokens.weight.T


class Adam:
    """Adam over all weights as one vector: torch.optim imports the compiler, which takes each process two seconds."""

    def __init__(self, model) -> None:
        self.weights = list(model.parameters())
        size = sum(weight.numel() for weight in self.weights)
        self.state = {"steps": torch.tensor(0), "mean": torch.zeros(size), "square": torch.zeros(size)}

    def step(self, gradient, rate=3e-3, eps=1e-8):
        steps, mean, square = self.state.values()
        steps += 1
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient * gradient, 0.01)
        change = mean / (1 - 0.9**steps) / ((square / (1 - 0.99**steps)).sqrt() + eps)
        vector = parameters_to_vector(self.weights).detach() - rate * change
        vector_to_parameters(vector, self.weights)


def row_gradient(model, batch, row):
    """The summed loss of one row, followed by the gradients of all weights: one vector."""
    model.zero_grad()
    logits = model(batch.inputs[row], batch.positions[row], batch.doc_ids[row])
    loss = cross_entropy(logits, batch.targets[row], reduction="sum")
    loss.backward()
    return torch.cat([loss.detach().view(1), *(weight.grad.flatten() for weight in model.parameters())])


def of_all_ranks(own):
    """The ranks' tensors, concatenated: with shard="row", the rows of the global batch in its order."""
    if not dist.is_initialized():
        return own
    all_of_them = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, own)
    return torch.cat(all_of_them)


def train_on(model, optimizer, batch):
    """Take a step; return the global batch's loss for each target in the loss, and their number."""
    rows = of_all_ranks(torch.stack([row_gradient(model, batch, row) for row in range(len(batch.inputs))]))
    trained = int(of_all_ranks(torch.tensor([batch.num_loss_tokens])).sum())
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    loss, gradient = (total / trained).split([1, len(total) - 1])
    optimizer.step(gradient)
    return loss.item(), trained


def save(path, model, optimizer, loader):
    """Write a checkpoint, whole or not at all; all ranks call it."""
    states = [loader.state_dict()]
    if dist.is_initialized():
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, loader.state_dict())
    if rank_and_world_size()[0] == 0:
        state = json.dumps(nanopack.merge_states(states))
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state, "loader": state}, f"{path}.new")
        os.replace(f"{path}.new", path)


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def main(folder: Path, steps: int = STEPS) -> None:
    # on the CPU, in one thread, everything here is deterministic; to have torch watch over it imports the compiler too
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    rank, world_size = rank_and_world_size()
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    chats = [json.loads(line) for line in itertools.islice(SHIPPED.open(encoding="utf-8"), 200)]
    model = Model()
    optimizer = Adam(model)
    # small, so that documents become old and what a state says of their ages counts
    packing = nanopack.BestFit(window=16, max_age=4)
    arguments = dict(packing=packing, shard="row", seed=7, extras=("positions", "doc_ids"), num_workers=1)
    with nanopack.Loader(chats, BYTES, GLOBAL_ROWS // world_size, SEQ_LEN, **arguments) as loader:
        start = 0
        with contextlib.suppress(FileNotFoundError):
            saved = torch.load(folder / "checkpoint")
            model.load_state_dict(saved["model"])
            optimizer.state = saved["optimizer"]
            loader.load_state_dict(json.loads(saved["loader"]))
            start = json.loads(saved["loader"])["step"]
        # only now: a state is loaded into a producer of its own
        (folder / f"producer of {os.getpid()}").write_text(str(loader.producer_pid))
        with open(folder / "losses" if rank == 0 else os.devnull, "a", buffering=1) as losses:
            losses.write(f"from {start} on {world_size}\n")
            for batch in itertools.islice(loader, steps - start):
                loss, trained = train_on(model, optimizer, batch)
                losses.write(f"{batch.step} {loss.hex()} {trained}\n")
                if (batch.step + 1) % SAVE_EVERY == 0:
                    save(folder / "checkpoint", model, optimizer, loader)
    if rank == 0:
        torch.save(model.state_dict(), folder / "weights")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
