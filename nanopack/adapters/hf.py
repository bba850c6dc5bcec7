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

A trainer would shard a data set a second time, so give it the batches instead:

    trainer.get_train_dataloader = lambda: Batches(loader)

The trainer needs `max_steps`; SFTTrainer also wants a `train_dataset` and
`dataset_kwargs={"skip_prepare_dataset": True}`, and does not read it any further.

These models shift inside: they compare the logits of a column with the label of the next. So labels are the targets
moved one column to the right, and rows have one column more than the Loader's, T + 1, of which the last is a label
only. Nothing is lost: the targets of the loss are the Loader's, all of them. Ask for seq_len=2047 to get rows of 2048.

attention_mask is left out and use_cache is False, because only then does transformers derive document boundaries from
`position_ids` and keep documents from attending to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nanopack.batch import Batch
from nanopack.distributed import of_all_ranks
from nanopack.loader import Loader

# The label that transformers leaves out of the loss; no argument of its models changes it.
IGNORED = -100


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return the arguments of a causal language model of transformers: three new (B, T + 1) int64 tensors and a switch.

    input_ids: the inputs and, where the last target is in the loss, that target (else any id: it is never used).
    labels: -100 and then the targets. position_ids: they restart at every document; padding counts as one.
    use_cache: False.
    `num_items_in_batch`, the number of labels other than -100, is `batch.num_loss_tokens`, known without a sync.

    Raises ValueError where the batch has no positions, or has weights, which these losses do not support.
    """
    if batch.positions is None:
        raise ValueError(
            'the batch has no positions, by which transformers separates documents; pass extras=("positions",)'
        )
    if batch.weights is not None:
        raise ValueError(
            "the batch has weights, which the losses of transformers do not support; pass loss_weights=None"
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
    """The batches of a loader as `model_inputs`, in place of a DataLoader.

    Each iteration continues where the loader is.
    """

    def __init__(self, loader: Loader) -> None:
        """Raise ValueError unless `model_inputs` can take the loader's batches."""
        config = loader.config
        if "positions" not in config.extras:
            raise ValueError(f'extras={config.extras!r} lacks "positions", by which transformers separates documents')
        if config.loss_weights is not None:
            raise ValueError(
                f"loss_weights={config.loss_weights!r}: the losses of transformers do not support weights; "
                f"pass loss_weights=None"
            )
        if config.ignore_index != IGNORED:
            raise ValueError(f"ignore_index={config.ignore_index}: transformers ignores {IGNORED}; leave it out")
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield them."""
        return map(model_inputs, self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch delivered, on every rank that of all ranks. All ranks call it."""
        return of_all_ranks(self.loader.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a state; see `Loader.load_state_dict`."""
        self.loader.load_state_dict(state_dict)
