"""What `Batches.attach` puts into a Trainer or SFTTrainer: a callback that saves and resumes, and a weighted loss.

    Batches   ->   note() each batch   ->   on_step_begin(): totals of the step   ->   compute_loss_func()
                                            on_step_end(): the loader's state     ->   trainer_state.json

A trainer fetches all micro-batches of a step, then calls `on_step_begin`, then trains them in that order: there the sum
of their weights is known, over all ranks by one all_reduce. A validation batch it evaluates before it fetches the next.
The loss function gets only the labels of a batch, so the weights wait here. The state goes into the trainer's own,
which it writes last: a checkpoint is whole with it or not at all.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from math import ceil, fsum
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from nanopack.adapters.hf import Batches
from nanopack.batch import Batch
from nanopack.distributed import sum_over_ranks
from nanopack.loss import weighted_loss

# where the loader's state is in `trainer_state.json`, under "stateful_callbacks"
KEY = "nanopack"


class _Weights(NamedTuple):
    """What is kept of a fetched batch: (B, T) float32 or None, and two sums."""

    weights: torch.Tensor | None
    weight_sum: float
    num_tokens: int


class AttachedTrainer(TrainerCallback):
    """The callback of one trainer."""

    def __init__(self, trainer: Any, batches: Batches) -> None:
        """Change the trainer as `Batches.attach` says."""
        self.batches = batches
        self.is_done = False
        """Whether training was resumed where no step is left: there are no batches then."""
        self._trainer = trainer
        self._device = batches.loader.device
        self._weighted = batches.loader.config.loss_weights is not None
        # SFTTrainer counts the columns of one row, whatever the rows are and padding is
        self._counts_tokens = hasattr(trainer, "_total_train_tokens")
        self._num_tokens = 0
        self._fetched: list[_Weights] = []
        self._step: deque[tuple[torch.Tensor | None, float]] = deque()
        self._validated: _Weights | None = None
        if self._weighted:
            self._take_the_loss()
        trainer.get_train_dataloader = lambda: batches
        trainer.add_callback(self)

    def _take_the_loss(self) -> None:
        args = self._trainer.args
        if self._trainer.compute_loss_func is not None:
            raise ValueError("the trainer has a compute_loss_func, which knows no loss_weights; leave one of them out")
        if not args.average_tokens_across_devices and args.world_size > 1:
            raise ValueError("loss_weights need average_tokens_across_devices=True: the sum of weights is of all ranks")
        self._trainer.compute_loss_func = self.compute_loss

    def note(self, batch: Batch, *, train: bool) -> None:
        """Take note of a batch that the trainer fetches."""
        if not (self._weighted or self._counts_tokens):
            return
        # cloned, because the next micro-batch of the step is written over it where the loader is static
        weights = None if batch.weights is None else batch.weights.clone()
        noted = _Weights(weights, batch.weight_sum, batch.num_tokens)
        if train:
            self._fetched.append(noted)
        else:
            self._validated = noted

    def skipped(self) -> _Skipped:
        """Return a data set: a placeholder for each batch of this epoch already trained, then the batches."""
        args, steps = self._trainer.args, self._trainer.state.global_step
        a_pass = args.max_steps
        if self.batches.loader.config.epochs is not None:
            a_pass = max(1, ceil(len(self.batches) / args.gradient_accumulation_steps))
        return _Skipped(self.batches, steps % a_pass * args.gradient_accumulation_steps)

    def compute_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the loss of a micro-batch: its weighted cross-entropies, over the sum of weights of its whole step.

        That of a validation batch is divided by the sum of its weights over all ranks. The trainer's compute_loss_func:
        the trainer multiplies the loss by the number of ranks, whose mean it then takes.
        """
        weights, total = self._weights()
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        return weighted_loss(logits[:, :-1], labels[:, 1:], weights, total)

    def _weights(self) -> tuple[torch.Tensor | None, float]:
        """Return the weights of the batch whose loss is due, and the sum that divides it."""
        if self._trainer.model.training and self._step:
            return self._step.popleft()
        if self._trainer.model.training or self._validated is None:
            raise ValueError(
                "this batch has no known loss weights: it did not come from attached Batches, or its loss was computed "
                "already; for validation use Batches(loader).attach(trainer, validation=Batches(validation_loader))"
            )
        validated, self._validated = self._validated, None
        return validated.weights, sum_over_ranks([validated.weight_sum], self._device)[0]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Resume from the loader's state in the checkpoint; RuntimeError if it has none."""
        # last, so that it sees the checkpoints that other callbacks ask for
        others = [callback for callback in self._trainer.callback_handler.callbacks if callback is not self]
        self._trainer.callback_handler.callbacks = [*others, self]
        self._fetched.clear()
        # transformers would train one step more, resumed from the last step's checkpoint
        self.is_done = state.global_step >= state.max_steps
        if state.global_step == 0:
            loader = self.batches.loader
            # batches were taken before: by hand, by another trainer, or by a training that was interrupted
            if loader.config.epochs is not None and not loader._run.resumed:
                loader.restart()
            return
        saved = state.stateful_callbacks.get(KEY)
        if saved is None:
            raise RuntimeError(
                f"the checkpoint of step {state.global_step} has no state of nanopack's loader, and its data "
                f"would begin again: it was saved without Batches(loader).attach(trainer), which both runs need"
            )
        self.batches.load_state_dict(saved["loader"])
        self._num_tokens = saved["num_tokens"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sum up, over all ranks, the micro-batches of the step that begins."""
        state.stateful_callbacks.pop(KEY, None)
        if not (self._weighted or self._counts_tokens):
            return
        own = [fsum(batch.weight_sum for batch in self._fetched), sum(batch.num_tokens for batch in self._fetched)]
        weight_sum, num_tokens = sum_over_ranks(own, self._device)
        self._num_tokens += int(num_tokens)
        self._step = deque((batch.weights, weight_sum) for batch in self._fetched)
        self._fetched.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the loader's state into the checkpoint that may follow, on all ranks."""
        if self._counts_tokens:
            self._trainer._total_train_tokens = self._num_tokens
            self._trainer._metrics["train"]["num_tokens"] = [self._num_tokens]
        # save_strategy="best" decides only after the evaluation
        by_evaluation = control.should_evaluate and args.save_strategy == "best"
        if args.world_size == 1 or control.should_save or by_evaluation:
            state.stateful_callbacks[KEY] = {"loader": self.batches.state_dict(), "num_tokens": self._num_tokens}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Do as after a step."""
        self.on_step_end(args, state, control)


class _Skipped(torch.utils.data.IterableDataset[Any]):
    """`count` times None, for accelerate to skip, and then the batches of a loader that has given those."""

    def __init__(self, batches: Batches, count: int) -> None:
        self._batches, self._count = batches, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain(itertools.repeat(None, self._count), self._batches)
