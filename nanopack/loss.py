"""The loss of packed batches: each target counts with its weight, and the sum of weights is that of the whole step.

    Batch.weights, Batch.weight_sum   ->   total_weight(), weighted_loss()   ->   a loss to call backward() on

A mean over each micro-batch is wrong where micro-batches or ranks have unequally many targets in the loss. In a loop of
your own, with gradient accumulation and DistributedDataParallel, which averages the gradients of the ranks:

    one_pass = iter(loader)
    while batches := list(itertools.islice(one_pass, accumulation_steps)):
        total = total_weight(batches)
        for batch in batches:
            loss = weighted_loss(model(batch.inputs), batch.targets, batch.weights, total)
            (loss * world_size).backward()
        optimizer.step()

The sum of these losses over micro-batches and ranks is the mean over all targets of the step, by weight. Without
`loss_weights`, each target counts 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import fsum
from typing import Any

import torch

from nanopack.batch import Batch
from nanopack.distributed import sum_over_ranks


def total_weight(batches: Iterable[Batch], process_group: Any = None) -> float:
    """Return the sum of `weight_sum` of these batches, and of those of the other ranks.

    Where torch.distributed is initialised it is an all_reduce that all ranks of `process_group` (None: of all) call;
    else only these batches count. Without `loss_weights` it is the number of targets in the loss.
    """
    batches = list(batches)
    device = batches[0].inputs.device if batches else torch.device("cpu")
    return sum_over_ranks([fsum(batch.weight_sum for batch in batches)], device, process_group)[0]


def weighted_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    total: float,
    *,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Return the cross-entropies of the targets, each times its weight, summed and divided by `total`: a scalar.

    Args:
        logits: (..., V), of any float dtype; the loss is computed in float32, or in float64 where they are.
        targets: (...,) int64, not shifted any further; those that are `ignore_index` do not count.
        weights: (...,) float32, or None: 1 for each target.
        total: sum of the weights of the whole step (`total_weight`); 0, as in a step of padding, gives a loss of 0.

    >>> logits = torch.zeros(1, 3, 4)
    >>> targets, weights = torch.tensor([[1, 2, -100]]), torch.tensor([[0.5, 1.5, 0.0]])
    >>> weighted_loss(logits, targets, weights, total=2.0).item() == torch.tensor(4.0).log().item()
    True
    """
    logits = logits.flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=ignore_index)
    if weights is not None:
        losses = losses * weights.flatten()
    return losses.sum() / (total or 1.0)
