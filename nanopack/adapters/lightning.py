"""Feed a Loader's batches to Lightning's Trainer, and save the loader's state in its checkpoints.

    make_loader   ->   Batches(make_loader)   ->   trainer.fit(model, datamodule=...)   ->   training_step(batch)
     loader.py                                      ckpt_path="last" resumes

    def make_loader():
        return Loader("chats/*.jsonl", tokenizer, 8, 2048, seed=1)

    def make_validation_loader():
        return Loader("held_out.jsonl", tokenizer, 8, 2048, epochs=1)

    Trainer(max_steps=10_000).fit(model, datamodule=Batches(make_loader, validation=make_validation_loader))

`training_step` and `validation_step` get the `Batch` itself. Each rank makes its loaders after Lightning has started
the process group and chosen the device, so this takes functions and not loaders.

Lightning fetches one batch ahead where it does not know how many there are, and drops it when it stops. The state
saved is that of the batch it trains, which it moves to the device right before. And Lightning restores a loader's
state only from a checkpoint within an epoch, a data module's always: so this is a data module.

An epoch of Lightning is a pass over all batches of the loader, its own `epochs` included; with `limit_train_batches` an
epoch continues after the one before. Validation, the sanity check, and with `overfit_batches` each epoch begin with the
first batch. A checkpoint that is written while a step fails counts that step's batch as trained.
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
    raise ImportError("this adapter needs lightning: pip install 'nanopack-gpu[lightning]'") from error


class _Fetched:
    """A batch that Lightning has fetched but not begun; opaque to its `apply_to_collection`."""

    def __init__(self, batch: Batch, state: dict[str, Any] | None) -> None:
        self.batch, self.state = batch, state


class _Validation:
    """The batches of a loader for validation: from the first on, each time."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[_Fetched]:
        self._loader.restart()
        return (_Fetched(batch, None) for batch in self._loader)

    def __len__(self) -> int:
        return len(self._loader)


class Batches(LightningDataModule):
    """The batches of a loader as a data module, for `trainer.fit`.

    Args:
        make_loader: returns the loader; called on every rank at the start of each `fit`, whose end closes it. It
            resumes after the batches that an earlier `fit`, or the run of the checkpoint, has trained.
        validation: returns the loader for validation, likewise. Without, subclass this to validate on anything else.
    """

    def __init__(self, make_loader: Callable[[], Loader], validation: Callable[[], Loader] | None = None) -> None:
        super().__init__()
        self.loader: Loader | None = None
        self.validation_loader: Loader | None = None
        self._make_loader, self._make_validation_loader = make_loader, validation
        # the states after the last batch trained, and after the last one fetched
        self._trained: Mapping[str, Any] | None = None
        self._fetched: Mapping[str, Any] | None = None
        if validation is not None:
            # only then: Lightning checks whether a data module has this method
            self.val_dataloader = lambda: _Validation(self._open(self.validation_loader))

    def setup(self, stage: str) -> None:
        """Make the loaders. Raise ValueError where fetching a batch would overwrite the previous one."""
        if stage in ("fit", "validate") and self._make_validation_loader is not None:
            self.validation_loader = self._make(self._make_validation_loader)
        if stage == "fit":
            self.loader = self._make(self._make_loader)
            self._fetched = self.loader.state_dict()
            if self._trained is None:
                self._trained = self._fetched

    @staticmethod
    def _make(make_loader: Callable[[], Loader]) -> Loader:
        loader = make_loader()
        if loader._run.static:
            loader.close()
            raise ValueError(
                "static=True: Lightning fetches the next batch before it trains the current one; leave it out"
            )
        return loader

    @staticmethod
    def _open(loader: Loader | None) -> Loader:
        if loader is None:
            raise TypeError("there is no loader before trainer.fit, which makes it")
        return loader

    def teardown(self, stage: str) -> None:
        """Close the loaders; their ledgers and stats can still be read."""
        if stage == "fit" and self.loader is not None:
            self.loader.close()
        if stage in ("fit", "validate") and self.validation_loader is not None:
            self.validation_loader.close()

    def train_dataloader(self) -> Batches:
        """Return itself: Lightning warns about an iterable without a state."""
        return self

    def __iter__(self) -> Iterator[_Fetched]:
        """Yield the batches after those already trained, whatever was fetched before; after the last, a new pass."""
        loader = self._open(self.loader)
        if self.trainer is not None and self.trainer.overfit_batches:
            loader.restart()
        else:
            if self._fetched is not self._trained:
                assert self._trained is not None
                loader.load_state_dict(self._trained)
            if loader._run.is_over():
                loader.restart()
        for batch in loader:
            self._fetched = loader.state_dict()
            yield _Fetched(batch, self._fetched)

    def __len__(self) -> int:
        """Return the number of batches in a pass. Raises TypeError ("no length" for Lightning) where it is endless."""
        return len(self._open(self.loader))

    def __bool__(self) -> bool:
        """Return True, without counting."""
        return True

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the `Batch`, already on its device; from here on it counts as trained."""
        if isinstance(batch, _Fetched):
            self._trained = batch.state or self._trained
            return batch.batch
        return batch if isinstance(batch, Batch) else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch trained, of all ranks. All ranks call it."""
        return {} if self._trained is None else of_all_ranks(self._trained)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a state at the next batch."""
        self._trained = state_dict
