"""Know which rank of how many this process is, and agree with the others how many batches there are.

Loader(rank=, world_size=, process_group=)   ->   rank_and_world_size(), agree_on_most()   ->   loader.py
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nanopack.state import merge_states

log = logging.getLogger("nanopack")


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return both as given, or as torch.distributed knows them; 0 of 1 where it is not initialised.

    Raises ValueError where one of them is given alone.
    """
    if (rank is None) != (world_size is None):
        alone = f"rank={rank!r}, but no world_size" if world_size is None else f"world_size={world_size!r}, but no rank"
        raise ValueError(f"{alone}; pass both, or neither")
    if rank is not None and world_size is not None:
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        log.warning(
            "WORLD_SIZE=%s is set, but torch.distributed is not initialised: this process reads all the data as rank 0 "
            "of 1; initialise it first, or pass rank and world_size",
            os.environ["WORLD_SIZE"],
        )
    return 0, 1


def check_group(group: Any, world_size: int) -> None:
    """Raise ValueError where the process group is not one of so many ranks."""
    ranks = torch.distributed.get_world_size(group)
    if ranks != world_size:
        raise ValueError(
            f"process_group has {ranks} ranks, but world_size={world_size}; pass the group of all ranks that share the "
            f"data"
        )


def agree_on_most(group: Any, count: Callable[[], int], device: torch.device) -> int:
    """Return the greatest of what `count` returns on each rank. All of the group call it; NCCL sends from `device`.

    Where `count` raises on one of them, that one raises it and the others RuntimeError, instead of waiting in vain.
    """
    on_gpu = torch.distributed.get_backend(group) == "nccl"
    own, error = 0, None
    try:
        own = count()
    except (Exception, SystemExit) as its_error:
        error = its_error
    most_and_failed = torch.tensor([own, int(error is not None)], device=device if on_gpu else "cpu")
    torch.distributed.all_reduce(most_and_failed, torch.distributed.ReduceOp.MAX, group)
    most, failed = most_and_failed.tolist()
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("another rank could not count its batches; what it raises says why")
    return int(most)


def agree_on_clock(group: Any, clock: str | None, device: torch.device) -> str | None:
    """Return the first rank's clock on each. All of the group call it where their chat template writes a date."""
    if clock is None:
        return None
    clocks = [clock]
    on_gpu = torch.distributed.get_backend(group) == "nccl"
    first = torch.distributed.get_global_rank(group, 0)
    torch.distributed.broadcast_object_list(clocks, first, group, device if on_gpu else None)
    return clocks[0]


def of_all_ranks(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of all ranks merged, on each of them: for trainers that save what one rank holds.

    All ranks of torch.distributed call it, at the same step. Where that is not initialised the state is all there is.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return dict(state)
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return merge_states(states)
