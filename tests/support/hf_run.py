"""Train a tiny Llama with transformers' Trainer or TRL's SFTTrainer, to be killed and resumed: see test_hf_trainer.py.

    python tests/support/hf_run.py FOLDER '{"max_steps": 10}' '{"seed": 1}' [--resume] [--trl]
    python -m torch.distributed.run --nproc-per-node=2 tests/support/hf_run.py FOLDER ...    (two ranks)

The first JSON are arguments of the trainer, the second of the loader. Each step's loss goes to FOLDER/losses, each
rank's batches to FOLDER/seen<rank>, a line for each; --resume takes the newest whole checkpoint, if there is one. With
--kills=N the run is killed N times at random moments and resumed, each time in a fork of what is imported by then.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_hf import MARKED, make_loader, make_model, make_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from nanopack import Loader
from nanopack.adapters.hf import Batches

TRAINING = {
    "max_steps": 10,
    "logging_steps": 1,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.0,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


class Seen(Batches):
    """Batches that note what they give, as short digests."""

    def __init__(self, loader: Loader) -> None:
        super().__init__(loader)
        self.seen: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._noted, super().__iter__())

    def _noted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(digest(inputs["labels"][:, 1:]))
        return inputs


def digest(targets: torch.Tensor) -> str:
    return hashlib.sha256(targets.numpy().tobytes()).hexdigest()[:12]


def make_trainer(folder: Path, *, trl: bool = False, model: Any = None, callbacks: Any = None, **arguments: Any) -> Any:
    """Return a Trainer, or with `trl` an SFTTrainer, of a tiny model."""
    arguments = {"output_dir": str(folder), **TRAINING, **arguments}
    model = make_model() if model is None else model
    if not trl:
        # Trainer wants something to evaluate, and does not look at it
        return Trainer(model, TrainingArguments(**arguments), eval_dataset=[0], callbacks=callbacks)
    import datasets
    from trl import SFTConfig, SFTTrainer

    untouched = datasets.Dataset.from_list([{"input_ids": [0], "labels": [0]}])
    config = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False)
    return SFTTrainer(
        model, config, train_dataset=untouched, eval_dataset=untouched, processing_class=make_tokenizer(MARKED)
    )


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Written(TrainerCallback):
    """Writes each step's loss as soon as it is known, to the bit."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs and state.is_world_process_zero:
            self.file.write(f"{state.global_step} {float(logs['loss']).hex()}\n")


def newest_whole_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written to its end: the trainer's state comes last."""

    def is_whole(path: Path) -> bool:
        try:
            return "nanopack" in json.loads(path.read_text())["stateful_callbacks"]
        except ValueError:
            return False

    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if is_whole(path)]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def main(folder: Path, training: dict[str, Any], loading: dict[str, Any], *flags: str) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    trainer = make_trainer(folder, trl="--trl" in flags, **training)
    trainer.add_callback(Written(folder / "losses"))
    with make_loader(**loading) as loader:
        batches = Seen(loader)
        batches.attach(trainer)
        trainer.train(resume_from_checkpoint=newest_whole_checkpoint(folder) if "--resume" in flags else None)
    with (folder / f"seen{trainer.args.process_index}").open("a") as seen:
        seen.writelines(f"{line}\n" for line in batches.seen)
    if torch.distributed.is_initialized():
        # gloo's threads may not outlive the interpreter
        torch.distributed.destroy_process_group()


def run_killed(kills: int, folder: Path, *arguments: Any) -> None:
    """Run in processes that are killed after 0 to 3 seconds, each resuming where the one before was."""
    moments = random.Random(kills)
    for number in range(kills):
        pid = os.fork()
        if pid == 0:
            main(folder, *arguments, "--resume")
            os._exit(0)
        time.sleep(moments.uniform(0, 3))
        os.kill(pid, (signal.SIGKILL, signal.SIGTERM)[number % 2])
        os.waitpid(pid, 0)
    main(folder, *arguments, "--resume")


if __name__ == "__main__":
    folder, *parsed = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    if sys.argv[4:] and sys.argv[4].startswith("--kills="):
        run_killed(int(sys.argv[4].removeprefix("--kills=")), folder, *parsed, *sys.argv[5:])
    else:
        main(folder, *parsed, *sys.argv[4:])
