"""Promises of Batches.attach: epochs, evaluations, checkpoints and weights of a Trainer are those of a plain loop."""

from __future__ import annotations

from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'nanopack-gpu[hf]'")

from hf_run import Seen, digest, losses_of, make_trainer
from plain_loop import TRAINERS, by_definition, chunks, losses_of_a_plain_loop, needs
from tiny_hf import make_loader
from transformers import TrainerCallback

from nanopack.adapters.hf import Batches

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.trainers]


# The losses


@pytest.mark.parametrize("trl", TRAINERS)
@pytest.mark.parametrize("loss_weights", [None, "token", "conversation"])
def test_each_steps_loss_is_that_of_a_plain_loop_over_the_references_batches(trl, loss_weights, tmp_path):
    needs(trl)
    weights = {"loss_weights": loss_weights, "seed": 1}
    with make_loader(**weights) as loader:
        trainer = make_trainer(tmp_path, trl=trl, max_steps=6)
        Batches(loader).attach(trainer)
        trainer.train()
    expected = losses_of_a_plain_loop(list(islice(chunks(by_definition(**weights)), 6)))
    # float32, added in another order
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-5)


def test_static_batches_are_weighed_as_others_are(tmp_path):
    found = []
    for static in (False, True):
        with make_loader(loss_weights="conversation", static=static) as loader:
            trainer = make_trainer(tmp_path, max_steps=3)
            Batches(loader).attach(trainer)
            trainer.train()
        found.append(losses_of(trainer))
    assert found[0] == found[1]


def test_weights_change_the_loss():
    """Without this the comparison above would prove nothing."""
    plain, weighed = ([by_definition(loss_weights=w)[:2]] for w in (None, "conversation"))
    assert abs(losses_of_a_plain_loop(plain)[0] - losses_of_a_plain_loop(weighed)[0]) > 1e-4


def test_a_loss_of_the_users_own_is_not_replaced(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.compute_loss_func = print
    with make_loader(loss_weights="token") as loader, pytest.raises(ValueError, match="has a compute_loss_func"):
        Batches(loader).attach(trainer)


def test_trls_count_of_tokens_is_the_ledgers(tmp_path):
    needs(True)
    with make_loader() as loader:
        trainer = make_trainer(tmp_path, trl=True, max_steps=3)
        Batches(loader).attach(trainer)
        trainer.train()
        counted = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
        assert counted[-1] == loader.stats()["tokens"] > 4 * 128
        assert len(set(counted)) == 3 and counted == sorted(counted)


# Epochs and evaluations


@pytest.mark.parametrize("trl", TRAINERS)
def test_three_epochs_are_three_passes(trl, tmp_path):
    needs(trl)
    a_pass = by_definition(epochs=1, seed=1)
    with make_loader(epochs=1, seed=1) as loader:
        batches = Seen(loader)
        # the last step of a pass has one micro-batch
        assert len(batches) == len(a_pass) and len(a_pass) % 3 == 1
        trainer = make_trainer(tmp_path, trl=trl, max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=3)
        batches.attach(trainer)
        trainer.train()
    assert batches.seen == [digest(batch.targets) for batch in a_pass] * 3
    assert trainer.state.global_step == 3 * ceil(len(a_pass) / 3)
    assert losses_of(trainer) == pytest.approx(losses_of_a_plain_loop([*chunks(a_pass, 3)] * 3), rel=1e-5)


def test_max_steps_beyond_a_pass_begins_another(tmp_path):
    a_pass = by_definition(epochs=1)
    with make_loader(epochs=1) as loader:
        batches = Seen(loader)
        steps = ceil(len(a_pass) / 2) + 2
        trainer = make_trainer(tmp_path, max_steps=steps)
        batches.attach(trainer)
        trainer.train()
    assert batches.seen == [digest(batch.targets) for batch in [*a_pass, *a_pass[:4]]]


class Interrupted(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        raise KeyboardInterrupt


def train_in_part(loader: Any, folder: Path) -> None:
    trainer = make_trainer(folder, callbacks=[Interrupted()])
    Batches(loader).attach(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.mark.parametrize(
    "before", [lambda loader, _: next(loader), train_in_part], ids=["a look", "an interrupted run"]
)
def test_a_training_that_is_not_resumed_has_all_batches_whatever_was_taken_before(before, tmp_path):
    a_pass = [digest(batch.targets) for batch in by_definition(epochs=1)]
    with make_loader(epochs=1) as loader:
        before(loader, tmp_path)
        trainer, batches = make_trainer(tmp_path, max_steps=-1, num_train_epochs=1), Seen(loader)
        batches.attach(trainer)
        trainer.train()
        assert batches.seen == a_pass
        trainer.train()
        assert batches.seen == a_pass * 2


def test_a_state_that_was_loaded_before_training_is_where_it_begins(tmp_path):
    a_pass = [digest(batch.targets) for batch in by_definition(epochs=1)]
    with make_loader(epochs=1) as loader:
        for _ in range(4):
            next(loader)
        state = loader.state_dict()
    with make_loader(epochs=1) as loader:
        loader.load_state_dict(state)
        trainer, batches = make_trainer(tmp_path, max_steps=-1, num_train_epochs=1), Seen(loader)
        batches.attach(trainer)
        trainer.train()
    assert batches.seen == a_pass[4:]


def test_an_endless_loader_needs_max_steps_and_has_no_length(tmp_path):
    with make_loader() as loader:
        trainer = make_trainer(tmp_path, max_steps=-1)
        Batches(loader).attach(trainer)
        with pytest.raises(ValueError, match="max_steps"):
            trainer.train()
        with pytest.raises(TypeError, match="endless"):
            len(Batches(loader))


@pytest.mark.parametrize("trl", TRAINERS)
@pytest.mark.parametrize("loss_weights", [None, "conversation"])
def test_every_evaluation_is_over_all_of_the_validation_data(trl, loss_weights, tmp_path):
    needs(trl)
    validation = {"epochs": 1, "loss_weights": loss_weights}
    held_out = by_definition(**validation)
    losses_at_first = [losses_of_a_plain_loop([[batch]])[0] for batch in held_out]
    with make_loader(loss_weights=loss_weights) as loader, make_loader(**validation) as val:
        batches = Seen(val)
        trainer = make_trainer(
            tmp_path, trl=trl, max_steps=3, eval_strategy="steps", eval_steps=1, eval_on_start=True,
            load_best_model_at_end=True, save_strategy="steps", save_steps=1,
        )  # fmt: skip
        Batches(loader).attach(trainer, validation=batches)
        trainer.train()
    assert batches.seen == [digest(batch.targets) for batch in held_out] * 4
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    # the trainer's own mean over batches
    assert evaluated[0] == pytest.approx(sum(losses_at_first) / len(losses_at_first), rel=1e-5)
    assert len(evaluated) == 4 and evaluated == sorted(evaluated, reverse=True)


def test_validation_without_end_is_refused(tmp_path):
    with make_loader() as loader, pytest.raises(ValueError, match=r"validation loader is endless.*epochs=1"):
        Batches(loader).attach(make_trainer(tmp_path), validation=Batches(loader))
