"""Give a Loader's batches to torchtitan's trainer: the loader class that its config names.

    Config(...)   ->   Trainer: config.dataloader.build(...)   ->   PackedDataLoader   ->   ({input, positions}, labels)

In a function of your config registry, instead of its data loader:

    config = llama3_8b()
    config.dataloader = PackedDataLoader.Config(
        dataset_path="chats/*.jsonl", arguments={"template": "llama3", "seed": 1, "num_workers": 4}
    )

The trainer gives rank and world size of its data-parallel mesh, batch size, sequence length and tokenizer, and its
checkpoints hold the loader's state: a resumed run continues after the batch trained last. The tensors are on the
host, where the trainer counts the labels before it moves them. `positions` restart at each document: from them
torchtitan makes the masks that keep documents apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch

from nanopack.batch import Batch
from nanopack.loader import Loader

try:
    import tyro
    from torchtitan.components.dataloader import BaseDataLoader
except ImportError as error:
    raise ImportError("this adapter needs torchtitan>=0.3: pip install 'nanopack-gpu[torchtitan]'") from error


class PackedDataLoader(BaseDataLoader):
    """The batches of a `Loader`, as torchtitan's `BaseDataLoader`."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """What the batches are made of; `dataset_path` is path or glob of the conversations, as of `Loader`."""

        conversations: Annotated[Callable[[], Any] | None, tyro.conf.Suppress] = None
        """Returns the conversations on each rank, whatever `Loader` takes; instead of `dataset_path`."""

        text_tokenizer: Annotated[Callable[[], Any] | None, tyro.conf.Suppress] = None
        """Returns the tokenizer, whatever `Loader` takes; None: the trainer's, which has no template "hf"."""

        arguments: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
        """Further arguments of `Loader`, by name: packing, template, loss, seed, num_workers, ..."""

        infinite: bool = True
        """False: the batches end after `epochs` passes of the arguments, or one. torchtitan's validator sets it."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Any,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        """Make the loader. Raise ValueError for arguments that torchtitan's loss or masks do not allow for."""
        arguments = dict(config.arguments)
        for name, only in {"loss_weights": None, "ignore_index": -100}.items():
            if arguments.get(name, only) != only:
                raise ValueError(f"{name}={arguments[name]!r}: torchtitan's loss supports only {only}; leave it out")
        if (config.conversations is None) == (config.dataset_path is None):
            raise ValueError("the config needs either dataset_path or conversations, a function that returns them")
        epochs = arguments.pop("epochs", None)
        self.loader = Loader(
            config.dataset_path if config.conversations is None else config.conversations(),
            tokenizer if config.text_tokenizer is None else config.text_tokenizer(),
            local_batch_size,
            seq_len,
            rank=dp_rank,
            world_size=dp_world_size,
            extras=["positions"],
            epochs=None if config.infinite else epochs or 1,
            device="cpu",
            **arguments,
        )

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield `{"input", "positions"}` and labels, each (local_batch_size, seq_len) int64 on the host."""
        return map(_as_torchtitan, self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank's loader; torch.distributed.checkpoint merges those of all ranks."""
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from there; an empty state, of a checkpoint without one, leaves the loader where it is."""
        if state_dict:
            self.loader.load_state_dict(state_dict)

    def close(self) -> None:
        """End the loader's processes; otherwise they end with the trainer's."""
        self.loader.close()


def _as_torchtitan(batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    assert batch.positions is not None
    return {"input": batch.inputs.long(), "positions": batch.positions.long()}, batch.targets
