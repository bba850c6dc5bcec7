"""Train torchtitan's debug model on nanopack's batches, on the CPU: see test_torchtitan.py.

    python -m torch.distributed.run --nproc-per-node=1 tests/support/torchtitan_run.py FOLDER [CUT]

Each step's loss goes to FOLDER/losses, the labels of each batch to FOLDER/seen, of validation to FOLDER/validated; the
checkpoint of every second step, to FOLDER, is where the next run resumes. CUT: the step during which the run dies.
"""

# ruff: noqa: E402 - torchtitan asks which accelerator there is when it is imported

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch._utils

# torchtitan asks for an accelerator; torch.cpu has what it calls, once it is named here
torch._utils._get_available_device_type = lambda: "cpu"
# masks and attention without a compiler: the C++ one takes minutes
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torchtitan.components.metrics
import torchtitan.distributed.utils
from tiny_hf import make_core
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from nanopack.adapters.torchtitan import PackedDataLoader


class Memory:
    """What torchtitan asks of an accelerator's memory."""

    device_capacity_gib, device_name = 1.0, "cpu"

    def reset_peak_stats(self) -> None:
        """Do nothing."""

    def get_peak_stats(self) -> Any:
        return torchtitan.components.metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)


def dense_attention(q: Any, k: Any, v: Any, *, block_mask: Any, scale: float | None, enable_gqa: bool, **_: Any) -> Any:
    """FlexAttention, which has no backward on the CPU, under the very mask."""
    mask = create_mask(block_mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], "cpu")
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa), None


torchtitan.components.metrics.build_device_memory_monitor = Memory
torchtitan.distributed.utils.set_pg_timeouts = lambda **_: None
FlexAttention._compiled_flex_attn = staticmethod(dense_attention)

CHATS = [
    [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"{2 * i}. " * (i % 5 + 1)}]
    for i in range(60)
]
STEPS = 6
ARGUMENTS = {"template": "chatml", "seed": 1, "num_workers": 0}


class Noted(PackedDataLoader):
    """Notes the labels it gives, a line for each batch."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(PackedDataLoader.Config):
        seen: str

    def __init__(self, config: Config, **arguments: Any) -> None:
        super().__init__(config, **arguments)
        self.seen = Path(config.seen)

    def __iter__(self) -> Any:
        for inputs, labels in super().__iter__():
            with self.seen.open("a") as file:
                file.write(f"{labels.flatten().tolist()}\n")
            yield inputs, labels


def make_config(folder: Path) -> Trainer.Config:
    config = llama3_debugmodel()
    model = config.model_spec.model
    model.layers = model.layers[:1]
    config.loss = CrossEntropyLoss.Config(global_vocab_size=model.vocab_size)
    config.dump_folder = config.hf_assets_path = str(folder)
    config.dataloader = Noted.Config(conversations=lambda: CHATS, arguments=ARGUMENTS, seen=str(folder / "seen"))
    config.training = dataclasses.replace(
        config.training, local_batch_size=2, global_batch_size=4, seq_len=64, steps=STEPS, disable_cuda_graphs=True
    )
    config.debug = dataclasses.replace(config.debug, seed=1)
    config.checkpoint = dataclasses.replace(config.checkpoint, enable=True, interval=2)
    config.validator = dataclasses.replace(
        config.validator,
        enable=True,
        freq=3,
        steps=-1,
        dataloader=Noted.Config(conversations=lambda: CHATS[:20], arguments=ARGUMENTS, seen=str(folder / "validated")),
    )
    return config


def main(folder: Path, cut: int | None) -> None:
    torch.set_num_threads(1)
    if not (folder / "tokenizer.json").exists():
        make_core().save(str(folder / "tokenizer.json"))
    trainer = make_config(folder).build()
    log, losses = trainer.metrics_processor.log, (folder / "losses").open("a", buffering=1)
    validated = trainer.metrics_processor.log_validation

    def noting(step: int, loss: float, *rest: Any, **more: Any) -> None:
        if step == cut:
            raise SystemExit(9)
        losses.write(f"{step} {loss.hex()}\n")
        log(step, loss, *rest, **more)

    def noting_validation(loss: float, step: int) -> None:
        losses.write(f"validation {step} {loss.hex()}\n")
        validated(loss=loss, step=step)

    trainer.metrics_processor.log = noting
    trainer.metrics_processor.log_validation = noting_validation
    trainer.train()
    trainer.close()
    trainer.dataloader.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
