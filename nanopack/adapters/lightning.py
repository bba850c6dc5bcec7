"""Give a Loader's batches to Lightning's Trainer, and save in its checkpoints how far the training is.

    make_loader   ->   Batches(make_loader)   ->   trainer.fit(model, datamodule=...)   ->   training_step(batch)
     loader.py                                      ckpt_path="last" goes on

    def make_loader():
        return Loader("chats/*.jsonl", tokenizer, 8, 2048, seed=1)

    Trainer(max_steps=10_000).fit(model, datamodule=Batches(make_loader))

`training_step` gets the `Batch` itself. It is made for each rank behind Lightning's own start of the process group and
choice of the device, which is why this takes a function and not a loader.

Lightning fetches a batch ahead where it is not told how many there are, and drops it when it stops. What counts here is
which batch it trains: it moves each to the device right before. And it gives a loader its state back only where a
checkpoint lies within an epoch, a data module always: so this is one.

What Lightning calls an epoch are all batches of the loader, its own `epochs` included; of an endless loader, those of
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
    """A batch that Lightning has, and has not begun to train; to its `apply_to_collection` it is one opaque thing."""

    def __init__(self, batch: Batch, state: dict[str, Any]) -> None:
        self.batch, self.state = batch, state


class Batches(LightningDataModule):
    """The batches of a loader as a data module, for `trainer.fit`. For validation, subclass it and add that loader.

    Args:
        make_loader: returns the loader; called on every rank at the start of each `fit`, whose end closes it. It goes
            on behind the batches that an earlier `fit`, or the run of the checkpoint, has trained.
    """

    def __init__(self, make_loader: Callable[[], Loader]) -> None:
        super().__init__()
        self.loader: Loader | None = None
        self._make_loader = make_loader
        # where the run stands behind the batch trained last, and behind the one fetched last
        self._trained: Mapping[str, Any] | None = None
        self._fetched: Mapping[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Make the loader. Raise ValueError where its batches do not outlast the fetching of the next."""
        if stage != "fit":
            return
        self.loader = self._make_loader()
        if self.loader._static:
            self.loader.close()
            raise ValueError("static=True: Lightning fetches a batch before it trains the one it has; leave it out")
        self._fetched = self.loader.state_dict()
        if self._trained is None:
            self._trained = self._fetched

    def teardown(self, stage: str) -> None:
        """Close the loader; its ledger and stats can still be read."""
        if stage == "fit" and self.loader is not None:
            self.loader.close()

    def train_dataloader(self) -> Batches:
        """Return itself: Lightning warns of what it iterates over where that has no state."""
        return self

    def __iter__(self) -> Iterator[_Fetched]:
        """Yield the batches behind those that are trained, whatever was fetched before."""
        assert self.loader is not None and self._trained is not None
        if self._fetched is not self._trained:
            self.loader.load_state_dict(self._trained)
        for batch in self.loader:
            self._fetched = self.loader.state_dict()
            yield _Fetched(batch, self._fetched)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the `Batch`, which lies on its device; from here on it counts as trained."""
        if isinstance(batch, _Fetched):
            self._trained = batch.state
            return batch.batch
        return batch if isinstance(batch, Batch) else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands behind the batch trained last. All ranks call it."""
        return {} if self._trained is None else of_all_ranks(self._trained)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there at the next batch."""
        self._trained = state_dict
