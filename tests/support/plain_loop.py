"""What the trainers' tests compare with: the reference's batches, and the losses of a plain loop over them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_hf import DATA, MARKED, arguments_of, make_model, make_tokenizer

from nanopack import Batch, reference
from nanopack.loss import total_weight, weighted_loss

TRAINERS = [pytest.param(False, id="Trainer"), pytest.param(True, id="SFTTrainer")]


def needs(trl: bool) -> None:
    if trl:
        pytest.importorskip("trl", reason="needs trl: pip install 'nanopack-gpu[hf]'")
        pytest.importorskip("datasets", reason="needs datasets")


def by_definition(**arguments: Any) -> list[Batch]:
    """The batches of a pass, or the first 40 of an endless run, of the reference."""
    return list(islice(reference.batches(DATA, make_tokenizer(MARKED), **arguments_of(**arguments)), 40))


def losses_of_a_plain_loop(steps: list[list[Batch]]) -> list[float]:
    """Train on these micro-batches of each step, those of all ranks among them; return the loss of each step."""
    model, losses = make_model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for batches in steps:
        total, loss_of_step = total_weight(batches), 0.0
        for batch in batches:
            logits = model(batch.inputs.long(), position_ids=batch.positions.long(), use_cache=False).logits
            loss = weighted_loss(logits, batch.targets, batch.weights, total)
            loss.backward()
            loss_of_step += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_step)
    return losses


def chunks(batches: list[Batch], size: int = 2) -> Iterator[list[Batch]]:
    for start in range(0, len(batches), size):
        yield batches[start : start + size]
