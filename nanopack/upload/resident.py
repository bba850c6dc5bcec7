"""The words of a loader's data, resident on its device, and the kernels that are bound to them.

StoreReader, Loader(resident=)   ->   Resident   ->   kernel for Upload, load for Halves
    producer/stored.py                 words.py           executor.py
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch

from nanopack.producer.reader import Reader
from nanopack.producer.stored import StoreReader
from nanopack.upload.device import Cpu, Cuda, Kernel
from nanopack.upload.executor import Gathering, make_gather, make_load
from nanopack.upload.words import Words, check_ids, resident_words


class Resident:
    """Holds the words until `release`, until this is dropped, or until the interpreter's exit."""

    def __init__(self, reader: Reader, device: Cpu | Cuda, executor: str | None, *, on_host: bool) -> None:
        """Bring the words to the device; raise as `check_ids`, `resident_words` and `make_kernel`."""
        # reader_of gives no other to a loader whose words are resident
        assert isinstance(reader, StoreReader)
        self.reader = reader
        self._device, self._executor = device, executor
        if reader.bare is not None:
            check_ids(reader.arrays, reader.bare)
        words = resident_words(reader.arrays, reader.layout.word_dtype, device, on_host=on_host)
        self.release: Any = weakref.finalize(self, _release, os.getpid(), words)
        self._what = Gathering(
            words.words,
            bos_id=reader.tokenizer.bos_id,
            ignore_index=reader.config.ignore_index,
            all_in_loss=reader.all_in_loss,
            marked=reader.marked,
        )
        self.kernel: Kernel = make_gather(executor, device.device, reader.layout, self._what)

    def load(self, tables: torch.Tensor, counter: torch.Tensor, facts: torch.Tensor) -> Kernel:
        """Return load(half, outputs) for `Halves`."""
        return make_load(self._executor, self._device.device, self.reader.layout, self._what, tables, counter, facts)


def _release(owner: int, words: Words) -> None:
    """Release the words, but not in a process forked from their owner."""
    if os.getpid() == owner:
        words.release()
