"""Feed a Loader's batches to Lightning's Trainer, and save the loader's state in its checkpoints.

    make_loader   ->   Batches(make_loader)   ->   trainer.fit(model, datamodule=...)   ->   training_step(batch)
     loader.py                                      ckpt_path="last" resumes

    def make_loader():
        return Loader("chats/*.jsonl", tokenizer, 8, 2048, seed=1)

    Trainer(max_steps=10_000).fit(model, datamodule=Batches(make_loader))

`training_step` gets the `Batch` itself. Each rank makes its loader after Lightning has started the process group and
chosen the device, so this takes a function and not a loader.

Lightning fetches one batch ahead where it does not know how many there are, and drops it when it stops. The state
saved is that of the batch it trains, which it moves to the device right before. And Lightning restores a loader's
state only from a checkpoint within an epoch, a data module's always: so this is a data module.

An epoch of Lightning is all batches of the loader, its own `epochs` included; of an endless loader, those of
`limit_train_batches`. A checkpoint that is written while a step fails counts that step's batch as trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from nanopack.batch import Batch
from nanopack.distributed import of_all_ranks
from nanopack.loader import Loader

try:
    from lightning.pytorch import LightningDataModule
except ImportError as error:
    raise ImportError("this adapter needs lightning: pip install 'nanopack[lightning]'") from error


class _Fetched:
    """A batch that Lightning has fetched but not begun to train; opaque to its `apply_to_collection`."""

    def __init__(self, batch: Batch, state: dict[str, Any]) -> None:
        self.batch, self.state = batch, state


class Batches(LightningDataModule):
    """The batches of a loader as a data module, for `trainer.fit`. For validation, subclass it and add that loader.

    Args:
        make_loader: returns the loader; called on every rank at the start of each `fit`, whose end closes it. It
            resumes after the batches that an earlier `fit`, or the run of the checkpoint, has trained.
    """

    def __init__(self, make_loader: Callable[[], Loader]) -> None:
        super().__init__()
        self.loader: Loader | None = None
        self._make_loader = make_loader
        # the states after the last batch trained, and after the last one fetched
        self._trained: Mapping[str, Any] | None = None
        self._fetched: Mapping[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Make the loader. Raise ValueError where fetching a batch would overwrite the previous one."""
        if stage != "fit":
            return
        self.loader = self._make_loader()
        if self.loader._static:
            self.loader.close()
            raise ValueError("static=True: Lightning fetches a batch before it trains the previous one; leave it out")
        self._fetched = self.loader.state_dict()
        if self._trained is None:
            self._trained = self._fetched

    def teardown(self, stage: str) -> None:
        """Close the loader; its ledger and stats can still be read."""
        if stage == "fit" and self.loader is not None:
            self.loader.close()

    def train_dataloader(self) -> Batches:
        """Return itself: Lightning warns about an iterable without a state."""
        return self

    def __iter__(self) -> Iterator[_Fetched]:
        """Yield the batches after those already trained, whatever was fetched before."""
        assert self.loader is not None and self._trained is not None
        if self._fetched is not self._trained:
            self.loader.load_state_dict(self._trained)
        for batch in self.loader:
            self._fetched = self.loader.state_dict()
            yield _Fetched(batch, self._fetched)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the `Batch`, already on its device; from here on it counts as trained."""
        if isinstance(batch, _Fetched):
            self._trained = batch.state
            return batch.batch
        return batch if isinstance(batch, Batch) else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch trained, of all ranks. All ranks call it."""
        return {} if self._trained is None else of_all_ranks(self._trained)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a state at the next batch."""
        self._trained = state_dict
