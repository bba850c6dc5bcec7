"""Promises of nanopack/loss.py: accumulated and weighted, a step's loss is the mean over its targets, by weight."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from data_sets import SMALL

from nanopack import Loader
from nanopack.loss import total_weight, weighted_loss

CHATS = [
    [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{2 * i}. " * (i % 5 + 1)}]
    for i in range(40)
]


def logits_of(inputs: torch.Tensor) -> torch.Tensor:
    """A model of a kind: any logits that depend on the inputs."""
    table = torch.randn(SMALL.n_vocab, SMALL.n_vocab, generator=torch.Generator().manual_seed(0))
    return table[inputs.long()]


@pytest.mark.parametrize("loss_weights", [None, "token", "conversation"])
def test_micro_batches_have_together_the_loss_of_one_large_batch(loss_weights):
    with Loader(CHATS, SMALL, 2, 33, packing="pad", loss_weights=loss_weights, device="cpu", num_workers=0) as loader:
        batches = list(islice(loader, 3))
    assert len({batch.num_loss_tokens for batch in batches}) > 1
    total = total_weight(batches)
    parts = [weighted_loss(logits_of(b.inputs), b.targets, b.weights, total).item() for b in batches]
    weighted = count = 0.0
    for batch in batches:
        for row in range(2):
            log_probs = logits_of(batch.inputs[row]).double().log_softmax(-1)
            for column, target in enumerate(batch.targets[row].tolist()):
                if target != -100:
                    weight = 1.0 if batch.weights is None else batch.weights[row, column].item()
                    weighted -= weight * log_probs[column, target].item()
                    count += weight
    assert total == pytest.approx(count, rel=1e-12)
    # float32 here, float64 there
    assert sum(parts) == pytest.approx(weighted / count, rel=1e-5)


def test_a_step_of_padding_has_a_loss_of_zero_and_a_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = weighted_loss(logits, torch.full((2, 3), -100), torch.zeros(2, 3), total_weight([]))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(2, 3, 5))


def test_half_precision_is_computed_in_float32_and_double_stays_double():
    logits, targets = torch.randn(1, 4, 7), torch.tensor([[1, 2, 3, -100]])
    half = logits.bfloat16()
    assert torch.equal(weighted_loss(half, targets, None, 3.0), weighted_loss(half.float(), targets, None, 3.0))
    assert weighted_loss(logits.double(), targets, None, 3.0).dtype == torch.float64
