"""Train a tiny model with Lightning, to be cut off and resumed: see tests/adapters/test_lightning.py.

    python -m torch.distributed.run --nproc-per-node=2 tests/support/lightning_run.py FOLDER

Each rank trains 3 steps, and then 3 more from the checkpoint of the second; FOLDER/rank0, FOLDER/rank1 get the batches.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from distributed_run import BYTES, Model
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn.functional import cross_entropy

from nanopack import Batch, Loader
from nanopack.adapters.lightning import Batches

CHATS = [
    [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"{2 * i}. " * (i % 5 + 1)}]
    for i in range(60)
]


def make_loader(**arguments: Any) -> Loader:
    arguments = {"seed": 1, "extras": ("positions", "doc_ids"), "device": "cpu", "num_workers": 0, **arguments}
    return Loader(CHATS, BYTES, **{"batch_size": 2, "seq_len": 64, **arguments})


class Trained(LightningModule):
    """A tiny model that notes the batches it trains, their tokens and their losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Model()
        self.seen: list[tuple[int, list[list[int]]]] = []
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        # its attention takes one row
        logits = torch.stack(
            [self.model(*row) for row in zip(batch.inputs, batch.positions, batch.doc_ids, strict=True)]
        )
        loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum") / max(
            1, batch.num_loss_tokens
        )
        self.seen.append((batch.step, batch.inputs.tolist()))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def make_trainer(folder: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "enable_checkpointing": bool(callbacks)}
    return Trainer(callbacks=list(callbacks), **{**quiet, **arguments})


def saved_every(steps: int, folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=steps, save_top_k=-1)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    seen = []
    for stop, checkpoint in ((3, None), (5, folder / "step=2.ckpt")):
        model = Trained()
        # no loader before `fit`: here the ranks do not know of each other
        make_trainer(folder, saved_every(2, folder), max_steps=stop, devices=2, strategy="ddp").fit(
            model, datamodule=Batches(make_loader), ckpt_path=checkpoint
        )
        seen.append(model.seen)
    torch.save(seen, folder / f"rank{os.environ['RANK']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
