"""Feed a Loader's batches to Hugging Face: models, accelerate, transformers' Trainer, TRL's SFTTrainer.

    Loader   ->   Batches(loader)   ->   dicts of input_ids, labels, position_ids, use_cache: model(**inputs).loss

In your own loop (accelerate's `prepare` is for the model and the optimizer; a loader made after the Accelerator, or
after the TrainingArguments, reads its rank's shard by itself and puts tensors on its device):

    with Loader(conversations, tokenizer, 8, 2047, template="hf", extras=("positions",)) as loader:
        for batch in loader:
            loss = model(**model_inputs(batch), num_items_in_batch=batch.num_loss_tokens).loss

    accelerator.register_for_checkpointing(Batches(loader))

so that `accelerator.save_state` also saves the loader's state, and `load_state` resumes after the last batch delivered.
Register `Batches` and not the loader: only rank 0's objects are written, and `Batches` holds the states of all ranks.

With transformers' Trainer or TRL's SFTTrainer:

    Batches(loader).attach(trainer, validation=Batches(validation_loader))
    trainer.train()  # later: trainer.train(resume_from_checkpoint=True)

The trainer trains on the one and evaluates on the other; each checkpoint holds the loader's state, of all ranks, and a
resumed run continues after the last batch trained. An epoch of the trainer is a pass over all `epochs` of the loader;
an endless loader needs `max_steps`. SFTTrainer also wants a `train_dataset` and
`dataset_kwargs={"skip_prepare_dataset": True}`, and both trainers want an `eval_dataset` to evaluate: neither is read.

These models shift inside: they compare the logits of a column with the label of the next. So labels are the targets
moved one column to the right, and rows have one column more than the Loader's, T + 1, of which the last is a label
only. Nothing is lost: the targets of the loss are the Loader's, all of them. Ask for seq_len=2047 to get rows of 2048.

attention_mask is left out and use_cache is False, because only then does transformers derive document boundaries from
`position_ids` and keep documents from attending to each other.
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

# The label that transformers leaves out of the loss; no argument of its models changes it.
IGNORED = -100


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return the arguments of a causal language model of transformers: three new (B, T + 1) int64 tensors and a switch.

    input_ids: the inputs and, where the last target is in the loss, that target (else any id: it is never used).
    labels: -100 and then the targets. position_ids: they restart at every document; padding counts as one.
    use_cache: False.
    `num_items_in_batch`, the number of labels other than -100, is `batch.num_loss_tokens`, known without a sync.

    Raises ValueError where the batch has no positions, or has weights, which the models' own losses do not support.
    """
    if batch.weights is not None:
        raise ValueError(
            "the batch has weights, which the losses of transformers do not support; attach Batches to a trainer, use "
            "nanopack.loss.weighted_loss in your own loop, or pass loss_weights=None"
        )
    return _inputs(batch)


def _inputs(batch: Batch) -> dict[str, Any]:
    if batch.positions is None:
        raise ValueError(
            'the batch has no positions, by which transformers separates documents; pass extras=("positions",)'
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
    """The batches of a loader as `model_inputs`, instead of a DataLoader.

    Each iteration continues where the loader is; where no batch is left it is a new pass over all `epochs`.

    Args:
        loader: with extras=("positions",) and ignore_index=-100. Its `loss_weights` need `attach`.
        restart: each iteration begins with the first batch: for validation that may end early.
    """

    # accelerate copies these from a DataLoader to skip what a resumed run has trained; see `dataset`
    batch_size, drop_last, prefetch_factor = None, False, None

    def __init__(self, loader: Loader, *, restart: bool = False) -> None:
        """Raise ValueError unless `model_inputs` can take the loader's batches."""
        config = loader.config
        if "positions" not in config.extras:
            raise ValueError(
                f'extras={config.extras!r} lacks "positions", by which transformers separates documents; add it'
            )
        if config.ignore_index != IGNORED:
            raise ValueError(f"ignore_index={config.ignore_index}: transformers ignores {IGNORED}; leave it out")
        self.loader = loader
        self.restart = restart
        self._trainer: AttachedTrainer | None = None

    def attach(self, trainer: Any, validation: Batches | None = None) -> None:
        """Make a Trainer or SFTTrainer train on these batches, and save and restore the loader's state.

        Sets the trainer's `get_train_dataloader`, with `validation` its `get_eval_dataloader`, and with `loss_weights`
        its `compute_loss_func`, which divides by the sum of weights of all ranks and accumulation steps. Adds a
        callback that saves the merged state of all ranks in `trainer_state.json` of each checkpoint, and restores it
        when training resumes. SFTTrainer's `num_tokens` becomes the exact number without padding.

        Raises ValueError where the trainer's loss does not support weights, or validation would not end. `train` raises
        RuntimeError for a checkpoint without a loader's state.
        """
        # imported here, because the rest of this file works without transformers
        from nanopack.adapters.hf_trainer import AttachedTrainer

        if validation is not None and validation.loader.config.epochs is None:
            raise ValueError("the validation loader is endless, and an evaluation takes all of it; pass epochs=1 to it")
        self._trainer = AttachedTrainer(trainer, self)
        if validation is not None:
            validation.restart = True
            validation._trainer = self._trainer
            trainer.get_eval_dataloader = lambda dataset=None: validation

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield them. Raise ValueError where their weights would be ignored."""
        if self.loader.config.loss_weights is not None and self._trainer is None:
            raise ValueError(
                f"loss_weights={self.loader.config.loss_weights!r}: the losses of transformers do not support weights; "
                f"attach the batches to a trainer, Batches(loader).attach(trainer), or pass loss_weights=None"
            )
        if self._trainer is not None and self._trainer.batches is self and self._trainer.is_done:
            return iter(())
        if self.restart or self.loader._run.is_over():
            self.loader.restart()
        return map(self._yielded, self.loader)

    def _yielded(self, batch: Batch) -> dict[str, Any]:
        if self._trainer is not None:
            self._trainer.note(batch, train=self._trainer.batches is self)
        return _inputs(batch)

    def __len__(self) -> int:
        """Return the number of batches in a pass. Raises TypeError ("no length" for trainers) where it is endless."""
        return len(self.loader)

    def __bool__(self) -> bool:
        """Return True, without counting."""
        return True

    @property
    def dataset(self) -> Any:
        """Data set from which accelerate skips what a resumed run has trained; for AttributeError, see its message."""
        if self._trainer is None:
            raise AttributeError(
                "a resumed run cannot skip the batches already trained: they come from nanopack's loader, whose state "
                "the checkpoint must hold; use Batches(loader).attach(trainer) in both runs"
            )
        return self._trainer.skipped()

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch delivered, on every rank that of all ranks. All ranks call it."""
        return of_all_ranks(self.loader.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a state; see `Loader.load_state_dict`."""
        self.loader.load_state_dict(state_dict)
