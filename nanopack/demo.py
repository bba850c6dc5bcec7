"""Train a small GPT on the conversations that ship with nanopack: a whole training loop, in plain torch.

    Loader   ->   inputs, positions, doc_ids, targets   ->   GPT   ->   losses, and a checkpoint to resume from

Written to be read and copied. What packed batches demand of a trainer is marked (1) to (4): positions restart at every
document, attention stays inside it, the loss is divided by the exact number of targets in the loss, and the loader's
state is saved along with the model's. On the CPU a run that is interrupted and resumed has the losses of an
uninterrupted one, bit for bit.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import tiktoken
import torch
from torch import nn
from torch.nn import functional

from nanopack.attention import document_mask
from nanopack.batch import Batch
from nanopack.data import CONVERSATIONS
from nanopack.loader import Loader
from nanopack.tokenizers.tokenizer import NANOCHAT_SPECIAL_TOKENS, Tokenizer, load_tokenizer

LAYERS, HEADS, WIDTH = 3, 4, 96
RANKS = 256
"""Ranks kept of chat32k: single bytes. All 32,759 would spend most of the time in the embedding and the head."""
BATCH_SIZE, SEQ_LEN = 2, 512
RATE, WARM_STEPS = 3e-3, 10
EVERY = 25
"""Steps between two evaluations, each followed by a checkpoint."""
HELD_OUT = 40
"""One in this many questions is held out."""
SEED = 0


class GPT(nn.Module):
    """A transformer with rotary positions."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        # at first all tokens are equally likely
        nn.init.zeros_(self.head.weight)

    def forward(self, inputs: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the logits, (B, T, vocabulary)."""
        turns = rotary(positions, WIDTH // HEADS)
        x = self.embed(inputs)
        for block in self.blocks:
            x = block(x, turns, mask)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """Attention, then a perceptron, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, turns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, (B, T, WIDTH)."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(turn(q, turns), turn(k, turns), v, attn_mask=mask)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        added: torch.Tensor = self.perceptron(self.norm_2(x))
        return x + added


def rotary(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Return cosine and sine, (2, B, 1, T, size / 2), of every position: arXiv 2104.09864."""
    rates = 10_000.0 ** (-torch.arange(0, size, 2, device=positions.device) / size)
    angles = positions[:, None, :, None] * rates
    return torch.stack([angles.cos(), angles.sin()])


def turn(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Return x, (B, HEADS, T, size), with each pair of its halves turned by the angle of its position."""
    (cosine, sine), (a, b) = turns.to(x.dtype), x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


def loss_sum(model: GPT, batch: Batch) -> torch.Tensor:
    """Return the sum of the losses of all targets in the loss."""
    assert batch.positions is not None
    # (1) positions restart and (2) attention ends with a document
    logits = model(batch.inputs, batch.positions, document_mask(batch.doc_ids))
    return functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")


@dataclass
class TrainingRun:
    """Results of a run so far; losses are means over the targets in the loss, in nats."""

    parameters: int
    losses: list[float] = field(default_factory=list)  # one a step
    held_out: dict[int, float] = field(default_factory=dict)  # steps done: loss of the held-out conversations
    tokens: int = 0  # trained on in this process, without padding
    seconds: float = 0.0

    def mean_losses(self) -> dict[int, float]:
        """Return the mean loss of the steps between two evaluations, by the number of steps done at the later one."""
        ends = [step for step in sorted(self.held_out) if step]
        return {end: fmean(self.losses[start:end]) for start, end in itertools.pairwise([0, *ends])}


def train(
    steps: int,
    folder: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> TrainingRun:
    """Train until `steps` steps are done, with a checkpoint in `folder` every EVERY steps; `resume` starts from it."""
    began = time.perf_counter()
    torch.manual_seed(SEED)
    # matrices this small gain little from more threads, and lose much if the cores are busy
    torch.set_num_threads(1)
    known, unknown = split(shipped())
    tokenizer = small_tokenizer()
    arguments: dict[str, Any] = {
        "batch_size": BATCH_SIZE,
        "seq_len": SEQ_LEN,
        "extras": ("positions", "doc_ids"),
        "device": device,
    }
    with Loader(unknown, tokenizer, epochs=1, **arguments) as held_out:
        unseen = list(held_out)
    with Loader(known, tokenizer, seed=SEED, **arguments) as loader:
        model = GPT(loader.tokenizer.vocab_size).to(loader.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
        run = TrainingRun(sum(weights.numel() for weights in model.parameters()))
        if resume:
            load(folder, run, model, optimizer, loader)
        while True:
            done = len(run.losses)
            if done not in run.held_out:
                run.held_out[done] = evaluate(model, unseen)
            if done:
                save(folder, run, model, optimizer, loader)
            if done >= steps:
                break
            losses = []
            for batch in itertools.islice(loader, min(EVERY - done % EVERY, steps - done)):
                losses.append(train_step(model, optimizer, batch))
                run.tokens += batch.num_tokens
                on_step(batch.step + 1)
            # the first time that the host waits for the device
            run.losses += torch.stack(losses).tolist()
    run.seconds = time.perf_counter() - began
    return run


def train_step(model: GPT, optimizer: torch.optim.Optimizer, batch: Batch) -> torch.Tensor:
    """Take one step; return the mean loss before it, on the device."""
    for group in optimizer.param_groups:
        group["lr"] = RATE * min(1.0, (batch.step + 1) / WARM_STEPS)
    # (3) known before the forward pass; with several batches or ranks a step, divide by the sum of theirs
    loss = loss_sum(model, batch) / max(1, batch.num_loss_tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(model: GPT, batches: Sequence[Batch]) -> float:
    """Return the mean loss over all targets of the batches: exact, however they are spread over the batches."""
    total = torch.stack([loss_sum(model, batch) for batch in batches]).sum()
    return float(total) / sum(batch.num_loss_tokens for batch in batches)


def save(folder: Path, run: TrainingRun, model: GPT, optimizer: torch.optim.Optimizer, loader: Loader) -> None:
    """Write the checkpoint atomically."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        # (4) counts the batches delivered, not those made ahead
        "loader": loader.state_dict(),
        "losses": run.losses,
        "held_out": run.held_out,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, checkpoint(folder).with_suffix(".new"))
    os.replace(checkpoint(folder).with_suffix(".new"), checkpoint(folder))


def load(folder: Path, run: TrainingRun, model: GPT, optimizer: torch.optim.Optimizer, loader: Loader) -> None:
    """Restore the checkpoint; ValueError if there is none, or it is not one of this run."""
    path = checkpoint(folder)
    if not path.exists():
        raise ValueError(f"{path} does not exist; train without --resume first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location=loader.device, weights_only=True)
            model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader_state = state["loader"]
        run.losses, run.held_out = state["losses"], state["held_out"]
    except OSError:
        raise
    # any other file can raise, and warn of, anything
    except Exception as error:
        raise ValueError(
            f"{path} is not a checkpoint of demo-train; pass --out with the folder of one, or leave out --resume"
        ) from error
    try:
        loader.load_state_dict(loader_state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def checkpoint(folder: Path) -> Path:
    """Return the path of the checkpoint."""
    return folder / "checkpoint.pt"


def small_tokenizer() -> tiktoken.Encoding:
    """Return chat32k cut to its first ranks: each rank merges earlier ones, so they are a tokenizer too."""
    tokenizer = load_tokenizer("chat32k")
    assert isinstance(tokenizer, Tokenizer)
    whole = tokenizer.encoding
    ranks = {token: rank for token, rank in whole._mergeable_ranks.items() if rank < RANKS}
    specials = {token: RANKS + number for number, token in enumerate(NANOCHAT_SPECIAL_TOKENS)}
    return tiktoken.Encoding(f"chat{RANKS}", pat_str=whole._pat_str, mergeable_ranks=ranks, special_tokens=specials)


def shipped() -> list[dict[str, Any]]:
    """Return the conversations that ship with nanopack."""
    return [json.loads(line) for line in Path(CONVERSATIONS).read_text(encoding="utf-8").splitlines()]


def split(conversations: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the conversations to train on and those held out: no question is in both."""
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for conversation in conversations:
        question = next(message["content"] for message in conversation["messages"] if message["role"] == "user")
        parts[zlib.crc32(question.encode()) % HELD_OUT == 0].append(conversation)
    return parts
