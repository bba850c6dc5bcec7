"""Give a Loader's batches to Hugging Face: models, accelerate, transformers' Trainer, TRL's SFTTrainer.

    Loader   ->   Batches(loader)   ->   dicts of input_ids, labels, position_ids, use_cache: model(**inputs).loss

In a loop of one's own (accelerate's `prepare` is for the model and the optimizer; a loader made after the Accelerator,
or after the TrainingArguments, reads its rank's share by itself and puts tensors on its device):

    with Loader(conversations, tokenizer, 8, 2047, template="hf", extras=("positions",)) as loader:
        for batch in loader:
            loss = model(**model_inputs(batch), num_items_in_batch=batch.num_loss_tokens).loss

    accelerator.register_for_checkpointing(Batches(loader))

so that `accelerator.save_state` also saves where the loader stands, and `load_state` goes on behind the batch given
last. Register `Batches` and not the loader: only what rank 0 has is written, and `Batches` has the states of all there.

With transformers' Trainer or TRL's SFTTrainer:

    Batches(loader).attach(trainer, validation=Batches(validation_loader))
    trainer.train()  # later: trainer.train(resume_from_checkpoint=True)

The trainer then trains on these batches and evaluates on those, every checkpoint holds where the loader stands on all
ranks, and a resumed run continues after the batch trained last. Of a loader with `epochs` an epoch of the trainer is a
pass (num_train_epochs=1 is all of it); an endless one needs `max_steps`. SFTTrainer also wants a `train_dataset` and
`dataset_kwargs={"skip_prepare_dataset": True}`, and either an `eval_dataset` to evaluate at all: none is looked at.

These models shift inside: they hold the logits of a column against the label of the next. So labels are the targets
moved one column to the right, and rows have one column more than the Loader's, T + 1, of which the last is a label
only. Nothing is lost: the targets of the loss are the Loader's, all of them. Ask for seq_len=2047 to have rows of 2048.

There is no attention_mask, and use_cache is False: only so does transformers look in `position_ids` for where the
documents of a row begin, and keeps them apart. With its default, use_cache=True, they would see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from nanopack.batch import Batch
from nanopack.distributed import of_all_ranks
from nanopack.loader import Loader

if TYPE_CHECKING:
    from nanopack.adapters.hf_trainer import AttachedTrainer

# What transformers leaves out of the loss; no argument of its models changes it.
IGNORED = -100


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return what a causal language model of transformers takes: three (B, T+1) int64 tensors, all new, and a switch.

    input_ids: the inputs and, where the last target is in the loss, that target (else any id: nothing looks at it).
    labels: -100 and then the targets. position_ids: they restart at every document, and padding counts as one.
    use_cache: False.
    Their labels other than -100 are `batch.num_loss_tokens`: `num_items_in_batch`, known without asking the device.

    ValueError where the batch has no positions, or has weights, which the models' own losses do not take.
    """
    if batch.weights is not None:
        raise ValueError(
            "the batch has loss weights, which the losses of transformers' models ignore; pass loss_weights=None, take "
            "nanopack.loss.weighted_loss of the logits, or attach Batches to a trainer"
        )
    return _inputs(batch)


def _inputs(batch: Batch) -> dict[str, Any]:
    if batch.positions is None:
        raise ValueError(
            'the batch has no positions, by which transformers keeps documents apart; pass extras=("positions",)'
        )
    inputs, targets = batch.inputs.long(), batch.targets
    last = torch.where(targets[:, -1:] == IGNORED, inputs[:, -1:], targets[:, -1:])
    return {
        "input_ids": torch.cat([inputs, last], dim=1),
        "labels": torch.cat([torch.full_like(last, IGNORED), targets], dim=1),
        "position_ids": torch.cat([batch.positions, batch.positions[:, -1:] + 1], dim=1).long(),
        "use_cache": False,
    }


class Batches(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The batches of a loader as `model_inputs`, for what iterates over a DataLoader.

    Each iteration resumes where the loader stands; where no batch is left it is a new pass over all of `epochs`.

    Args:
        loader: with extras=("positions",) and ignore_index=-100. Its `loss_weights` need `attach`.
        restart: every iteration begins with the first batch: for validation, which some trainers leave early.
    """

    # what accelerate copies of a DataLoader when it skips what a resumed run has trained; see `dataset`
    batch_size, drop_last, prefetch_factor = None, False, None

    def __init__(self, loader: Loader, *, restart: bool = False) -> None:
        """Raise ValueError where the loader's batches are not what `model_inputs` takes."""
        config = loader.config
        if "positions" not in config.extras:
            raise ValueError(f'extras={config.extras!r} lacks "positions", by which transformers keeps documents apart')
        if config.ignore_index != IGNORED:
            raise ValueError(f"ignore_index={config.ignore_index}: transformers ignores {IGNORED}; leave it out")
        self.loader = loader
        self.restart = restart
        self._trainer: AttachedTrainer | None = None

    def attach(self, trainer: Any, validation: Batches | None = None) -> None:
        """Have a Trainer or SFTTrainer train on these batches, and save and resume where they stand.

        Sets the trainer's `get_train_dataloader`, with `validation` its `get_eval_dataloader`, and with `loss_weights`
        its `compute_loss_func`, which divides by the sum of weights of all ranks and accumulation steps; adds a
        callback that puts the merged state of all ranks into `trainer_state.json` of each checkpoint and takes it up
        when training is resumed. SFTTrainer's `num_tokens` becomes the exact number without padding.

        Raises ValueError where the trainer computes a loss that takes no weights; from `train`, RuntimeError where the
        checkpoint holds no such state.
        """
        # here, because all else in this file works without transformers
        from nanopack.adapters.hf_trainer import AttachedTrainer

        self._trainer = AttachedTrainer(trainer, self)
        if validation is not None:
            validation.restart = True
            validation._trainer = self._trainer
            trainer.get_eval_dataloader = lambda dataset=None: validation

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield them. Raise ValueError where their weights would be ignored."""
        if self.loader.config.loss_weights is not None and self._trainer is None:
            raise ValueError(
                f"loss_weights={self.loader.config.loss_weights!r}: the losses of transformers' models ignore weights; "
                f"attach the batches to a trainer, Batches(loader).attach(trainer), or pass loss_weights=None"
            )
        if self.restart or self.loader._is_over():
            self.loader.restart()
        return map(self._yielded, self.loader)

    def _yielded(self, batch: Batch) -> dict[str, Any]:
        if self._trainer is not None:
            self._trainer.note(batch, train=self._trainer.batches is self)
        return _inputs(batch)

    def __len__(self) -> int:
        """Return how many batches a pass has; TypeError, which trainers take for "no length", where it is endless."""
        return len(self.loader)

    def __bool__(self) -> bool:
        """Return True, without counting."""
        return True

    @property
    def dataset(self) -> Any:
        """What accelerate iterates over to skip the batches that a resumed run has trained: none, once attached."""
        if self._trainer is None:
            raise AttributeError(
                "a resumed run cannot skip the batches that are trained: they come from nanopack's loader, whose state "
                "the checkpoint must hold; use Batches(loader).attach(trainer) before both runs"
            )
        return self._trainer.skipped()

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands after the batch given last, merged of all ranks. All ranks call it."""
        return of_all_ranks(self.loader.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from there; see `Loader.load_state_dict`."""
        self.loader.load_state_dict(state_dict)
