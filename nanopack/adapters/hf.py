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

With a trainer, which would shard a data set once more, so that it gets the batches and not a data set:

    trainer.get_train_dataloader = lambda: Batches(loader)

The trainer needs `max_steps`; SFTTrainer also wants a `train_dataset` and
`dataset_kwargs={"skip_prepare_dataset": True}`, and looks no further at it.

These models shift inside: they hold the logits of a column against the label of the next. So labels are the targets
moved one column to the right, and rows have one column more than the Loader's, T + 1, of which the last is a label
only. Nothing is lost: the targets of the loss are the Loader's, all of them. Ask for seq_len=2047 to have rows of 2048.

There is no attention_mask, and use_cache is False: only so does transformers look in `position_ids` for where the
documents of a row begin, and keeps them apart. With its default, use_cache=True, they would see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nanopack.batch import Batch
from nanopack.distributed import of_all_ranks
from nanopack.loader import Loader

# What transformers leaves out of the loss; no argument of its models changes it.
IGNORED = -100


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return what a causal language model of transformers takes: three (B, T+1) int64 tensors, all new, and a switch.

    input_ids: the inputs and, where the last target is trained, that target (else any id: nothing looks at it).
    labels: -100 and then the targets. position_ids: they restart at every document, and padding counts as one.
    use_cache: False.
    Their labels other than -100 are `batch.num_loss_tokens`: `num_items_in_batch`, known without asking the device.

    ValueError where the batch has no positions, or has weights, which these losses cannot take.
    """
    if batch.positions is None:
        raise ValueError(
            'the batch has no positions, by which transformers keeps documents apart; pass extras=("positions",)'
        )
    if batch.weights is not None:
        raise ValueError("the batch has weights, and the losses of transformers take none; pass loss_weights=None")
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

    Each iteration goes on where the loader stands.
    """

    def __init__(self, loader: Loader) -> None:
        """Raise ValueError where the loader's batches are not what `model_inputs` takes."""
        config = loader.config
        if "positions" not in config.extras:
            raise ValueError(f'extras={config.extras!r} lacks "positions", by which transformers keeps documents apart')
        if config.loss_weights is not None:
            raise ValueError(
                f"loss_weights={config.loss_weights!r}: the losses of transformers take none; pass loss_weights=None"
            )
        if config.ignore_index != IGNORED:
            raise ValueError(f"ignore_index={config.ignore_index}: transformers ignores {IGNORED}; leave it out")
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield them."""
        return map(model_inputs, self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands behind the batch given last, on every rank that of all. All ranks call it."""
        return of_all_ranks(self.loader.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there; see `Loader.load_state_dict`."""
        self.loader.load_state_dict(state_dict)
