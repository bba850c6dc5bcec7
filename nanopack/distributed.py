"""Find out which rank of how many this process is, and agree with the others on the number of batches.

Loader(rank=, world_size=, process_group=)   ->   rank_and_world_size(), agree_on_most()   ->   loader.py
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nanopack.state import merge_states

log = logging.getLogger("nanopack")

# Batches after which a loader looks at those of the other ranks: by then they are made.
LOOK_AFTER = 64

# Where launchers write the number of processes: torchrun, Slurm's srun, Open MPI, MPICH, MVAPICH, Flux, jsrun.
LAUNCHERS = (
    *("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    *("FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE"),
)


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return both as given, or those of torch.distributed; 0 of 1 where it is not initialised.

    Raises ValueError where only one of them is given, or none in one of several workers of a DataLoader.
    """
    if (rank is None) != (world_size is None):
        alone = f"rank={rank!r}, but no world_size" if world_size is None else f"world_size={world_size!r}, but no rank"
        raise ValueError(f"{alone}; pass both, or neither")
    if rank is not None and world_size is not None:
        return rank, world_size
    _refuse_to_read_in_every_worker()
    if _initialised():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name in LAUNCHERS:
        if os.environ.get(name, "1") not in ("", "1"):
            log.warning(
                "%s=%s is set, but torch.distributed is not initialised: this process reads all the data as rank 0 of "
                "1, and so does every other; initialise it first, or pass rank and world_size",
                *(name, os.environ[name]),
            )
            break
    return 0, 1


def _refuse_to_read_in_every_worker() -> None:
    worker = torch.utils.data.get_worker_info()
    if worker is not None and worker.num_workers > 1:
        raise ValueError(
            f"this is one of the {worker.num_workers} workers of a DataLoader, and each would deliver all the data; "
            f"use the loader without a DataLoader, or pass rank=get_worker_info().id, world_size={worker.num_workers} "
            f"(under torch.distributed rank * {worker.num_workers} + id, and {worker.num_workers} times as many)"
        )


def refuse_other_ranks(rank: int, world_size: int) -> None:
    """Raise RuntimeError where torch.distributed has other ranks by now than those that a loader took for its own."""
    if not _initialised():
        return
    now = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if now != (rank, world_size):
        raise RuntimeError(
            f"torch.distributed has {now[1]} ranks, and this is rank {now[0]}, but it was initialised after this "
            f"loader was made, which reads the data of rank {rank} of {world_size}; make the loader after "
            f"init_process_group, or pass rank={rank}, world_size={world_size} if that is meant"
        )


def group_to_agree_in(process_group: Any, epochs: int | None, world_size: int) -> Any:
    """Return the group in which the ranks agree on the number of batches; None if there is no such group, or no need.

    That is `process_group`, or torch.distributed's default group if it has `world_size` ranks: a condition that all
    ranks answer alike, so none waits forever. Raises ValueError for a group of another size.
    """
    if process_group is not None:
        if epochs is None:
            raise ValueError("process_group has no meaning without epochs; leave it out, or pass epochs")
        if (ranks := torch.distributed.get_world_size(process_group)) != world_size:
            raise ValueError(
                f"process_group has {ranks} ranks, but world_size={world_size}; pass the group of all ranks that share "
                f"the data"
            )
        return process_group
    if epochs is None or world_size == 1 or not _initialised():
        return None
    if (ranks := torch.distributed.get_world_size()) == world_size:
        return torch.distributed.group.WORLD
    log.warning(
        "the default group of torch.distributed has %d ranks, but world_size=%d: with epochs=%d, a rank that runs out "
        "renders the data of all ranks to count their batches; pass the process_group of those that share the data",
        *(ranks, world_size, epochs),
    )
    return None


def _initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def refuse_other_data(group: Any, facts: Mapping[str, object], device: torch.device) -> None:
    """Raise ValueError, naming them, where facts differ between the ranks of the group, which all call it."""
    digests = [hashlib.blake2b(repr(fact).encode(), digest_size=7).digest() for fact in facts.values()]
    numbers = torch.tensor([int.from_bytes(digest, "big") for digest in digests], device=_sending_device(group, device))
    # the greatest and, negated, the smallest of all ranks
    extremes = torch.stack([numbers, -numbers])
    torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group)
    greatest, smallest = extremes.tolist()
    if different := [name for name, high, low in zip(facts, greatest, smallest, strict=True) if high != -low]:
        raise ValueError(
            f"the ranks' loaders differ in {', '.join(different)}: each would read its share of something else. Give "
            f"all of them the same conversations in the same order, the same tokenizer and arguments; where each rank "
            f"has data of its own, pass rank=0, world_size=1"
        )


class OtherRanks:
    """Finds out, without waiting for them, whether the loaders of the other ranks read the same data.

    Each notes what it reads in the store of torch.distributed's default group, and looks once whether all have.
    """

    def __init__(self, facts: Mapping[str, object], rank: int, world_size: int) -> None:
        """Note the facts of this rank, `rank` of the default group's `world_size`."""
        digest = hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
        self._keys = [f"nanopack/{digest}/{number}" for number in range(world_size)]
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._store.set(self._keys[rank], "")
        self._left = LOOK_AFTER

    def count(self) -> None:
        """Count a batch; after the LOOK_AFTER-th, log a warning where a rank has noted other facts, or none."""
        self._left -= 1
        if self._left:
            return
        if others := [rank for rank, key in enumerate(self._keys) if not self._store.check([key])]:
            log.warning(
                "of %d ranks, %s %s no loader of the same conversations in the same order, with the same tokenizer and "
                "arguments: each reads its share of something else, and some conversations may be read twice or never. "
                "Where each rank has data of its own, pass rank=0, world_size=1",
                *(len(self._keys), _some(others), "has" if len(others) == 1 else "have"),
            )


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def are_all_ranks(rank: int, world_size: int) -> bool:
    """Return whether a loader's ranks are those of torch.distributed's default group, and more than one."""
    if world_size == 1 or not _initialised() or torch.distributed.get_backend() == "fake":
        return False
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) == (rank, world_size)


def agree_on_most(group: Any, count: Callable[[], int], device: torch.device) -> int:
    """Return the greatest number that `count` returns on any rank. All ranks of the group call it.

    Where `count` raises on one of them, that one raises it and the others RuntimeError, instead of waiting forever.
    """
    own, error = 0, None
    try:
        own = count()
    except (Exception, SystemExit) as its_error:
        error = its_error
    most_and_failed = torch.tensor([own, int(error is not None)], device=_sending_device(group, device))
    torch.distributed.all_reduce(most_and_failed, torch.distributed.ReduceOp.MAX, group)
    most, failed = most_and_failed.tolist()
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("another rank could not count its batches; its own error says why")
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
    """Return the merged states of all ranks, on each of them: for trainers that save only one rank's objects.

    All ranks of torch.distributed call it, at the same step. Where that is not initialised, the state is returned.
    """
    if not _initialised():
        return dict(state)
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return merge_states(states)


def sum_over_ranks(numbers: Sequence[float], device: torch.device, process_group: Any = None) -> list[float]:
    """Return the sum of each number over the ranks, in float64. All ranks of the group (None: of all) call it.

    Where torch.distributed is not initialised, the numbers are returned.
    """
    if not _initialised():
        return list(numbers)
    summed = torch.tensor(numbers, dtype=torch.float64, device=_sending_device(process_group, device))
    torch.distributed.all_reduce(summed, group=process_group)
    found: list[float] = summed.tolist()
    return found


def _sending_device(group: Any, device: torch.device) -> torch.device:
    """Return the device that the group sends from: with NCCL `device`, or the current GPU for "cpu"; else the CPU."""
    if torch.distributed.get_backend(group) != "nccl":
        return torch.device("cpu")
    return device if device.type == "cuda" else torch.device("cuda")
