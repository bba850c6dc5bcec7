"""Promises of Batches.attach: epochs, evaluations, checkpoints and weights of a Trainer are those of a plain loop."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'nanopack-gpu[hf]'")

from hf_run import Seen, digest, losses_of, make_trainer
from tiny_hf import DATA, MARKED, arguments_of, make_loader, make_model, make_tokenizer
from transformers import TrainerCallback

from nanopack import Batch, reference
from nanopack.adapters.hf import Batches
from nanopack.loss import total_weight, weighted_loss

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.trainers]

TRAINERS = [pytest.param(False, id="Trainer"), pytest.param(True, id="SFTTrainer")]
SCRIPT = Path(__file__).parents[1] / "support" / "hf_run.py"


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


# Resume


THREE = {"max_steps": -1, "gradient_accumulation_steps": 3}
CASES = {
    "endless": (False, 4, {}, {"seed": 1}),
    "accumulation 1": (False, 4, {"gradient_accumulation_steps": 1}, {"seed": 1}),
    "weighted": (False, 4, {}, {"loss_weights": "conversation"}),
    "within an epoch": (False, 4, THREE | {"num_train_epochs": 1}, {"seed": 1, "epochs": 1}),
    "within the second epoch": (False, 8, THREE | {"num_train_epochs": 2}, {"epochs": 1, "num_workers": 1}),
    "SFTTrainer": (True, 8, THREE | {"num_train_epochs": 2}, {"epochs": 1, "loss_weights": "conversation"}),
}


@pytest.mark.parametrize(("trl", "stop", "training", "loading"), CASES.values(), ids=CASES)
def test_a_resumed_run_has_the_batches_and_losses_of_one_that_was_not_interrupted(
    trl, stop, training, loading, tmp_path
):
    """Dropout is drawn, so that the random numbers count too."""
    needs(trl)

    def run(folder: Path, stop: int | None, resume: Any) -> tuple[list[str], dict[int, float], Any]:
        model = make_model(attention_dropout=0.1)
        trainer = make_trainer(folder, trl=trl, model=model, save_strategy="steps", save_steps=1, **training)
        with make_loader(**loading) as loader:
            batches = Seen(loader)
            batches.attach(trainer)
            if stop is not None:
                trainer.add_callback(Stop(stop))
            trainer.train(resume_from_checkpoint=resume)
        losses = {e["step"]: (e["loss"], e["epoch"]) for e in trainer.state.log_history if "loss" in e}
        return batches.seen, losses, trainer

    seen, losses, whole = run(tmp_path / "whole", None, None)
    first, losses_before, _ = run(tmp_path / "first", stop, None)
    rest, losses_after, last = run(tmp_path / "first", None, str(tmp_path / "first" / f"checkpoint-{stop}"))
    assert first + rest == seen and len(rest) > 3
    assert losses_after == losses and losses_before == {n: losses[n] for n in losses_before}
    assert last.state.global_step == whole.state.global_step
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, last.model.state_dict()[name]), name
    if trl:
        counted = [[e["num_tokens"] for e in t.state.log_history if "num_tokens" in e][-1] for t in (whole, last)]
        assert counted[0] == counted[1]


class Stop(TrainerCallback):
    """Asks to stop, and to save, at the end of a step: added after `attach`, and seen all the same."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


def test_a_run_resumed_at_the_end_of_an_epoch_begins_the_next(tmp_path):
    a_pass = [digest(batch.targets) for batch in by_definition(epochs=1)]
    for epochs, resume, want in ((1, None, a_pass), (3, True, a_pass * 2)):
        with make_loader(epochs=1) as loader:
            batches = Seen(loader)
            trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=epochs, save_strategy="epoch")
            batches.attach(trainer)
            trainer.train(resume_from_checkpoint=resume)
        assert batches.seen == want


@pytest.mark.parametrize("loading", [{}, {"epochs": 1}], ids=["endless", "in passes"])
def test_a_run_resumed_at_its_last_step_trains_no_other(loading, tmp_path):
    for resume in (None, True, True):
        with make_loader(**loading) as loader:
            batches = Seen(loader)
            trainer = make_trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=1)
            batches.attach(trainer)
            trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 5
        assert len(batches.seen) == (0 if resume else 5 * trainer.args.gradient_accumulation_steps)
    assert not (tmp_path / "checkpoint-6").exists()


def test_a_resumed_run_that_does_not_know_where_its_data_stood_is_refused(tmp_path):
    with make_loader() as loader:
        trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        trainer.get_train_dataloader = lambda: Batches(loader)
        trainer.train()
    with make_loader() as loader:
        trainer = make_trainer(tmp_path, max_steps=4)
        trainer.get_train_dataloader = lambda: Batches(loader)
        with pytest.raises(AttributeError, match=r"Batches\(loader\).attach\(trainer\)"):
            trainer.train(resume_from_checkpoint=True)
        trainer = make_trainer(tmp_path, max_steps=4)
        Batches(loader).attach(trainer)
        with pytest.raises(RuntimeError, match="checkpoint of step 2 has no state"):
            trainer.train(resume_from_checkpoint=True)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def run_script(folder: Path, training: dict[str, Any], loading: dict[str, Any], *flags: str, ranks: int = 1) -> None:
    folder.mkdir(exist_ok=True)
    launched = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launched, str(SCRIPT), str(folder), json.dumps(training), json.dumps(loading), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("kills", "trl", "loading"),
    [
        (2, False, {"seed": 1, "num_workers": 1}),
        pytest.param(25, False, {"epochs": 1, "num_workers": 1}, marks=pytest.mark.slow),
        pytest.param(25, True, {"seed": 1, "loss_weights": "conversation", "num_workers": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_moments_has_the_losses_of_one_that_was_not(kills, trl, loading, tmp_path):
    needs(trl)
    training = {"max_steps": 20, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    flags = ["--trl"] if trl else []
    run_script(tmp_path / "whole", training, loading, *flags)
    run_script(tmp_path / "killed", training, loading, f"--kills={kills}", *flags)
    whole, killed = (lines(tmp_path / run / "losses") for run in ("whole", "killed"))
    assert len(whole) == 20 and all(line.split()[0] == str(step) for step, line in enumerate(whole, start=1))
    # to the bit, also where a step was trained once more
    assert set(killed) == set(whole)


@pytest.mark.parametrize("loss_weights", [None, "conversation"])
def test_two_ranks_with_unequal_ends_train_and_resume_as_a_plain_loop_does(loss_weights, tmp_path):
    loading = {"epochs": 1, "seed": 1, "loss_weights": loss_weights}
    ranks = [by_definition(**loading, rank=rank, world_size=2) for rank in range(2)]
    # the last step has one micro-batch
    assert len(ranks[0]) % 4 == 1
    together = [[*one, *other] for one, other in zip(chunks(ranks[0], 4), chunks(ranks[1], 4), strict=True)]
    expected = losses_of_a_plain_loop(together * 2)

    training = {
        "max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4,
        "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip

    def run(folder: Path, *flags: str, **changes: Any) -> None:
        run_script(folder, training | changes, loading, *flags, ranks=2)

    run(tmp_path / "whole")
    losses = [float.fromhex(line.split()[1]) for line in lines(tmp_path / "whole" / "losses")]
    assert losses == pytest.approx(expected, rel=1e-5)
    run(tmp_path / "parts", max_steps=3)
    run(tmp_path / "parts", "--resume")
    assert lines(tmp_path / "parts" / "losses") == lines(tmp_path / "whole" / "losses")
    for rank in range(2):
        want = [digest(batch.targets) for batch in ranks[rank]] * 2
        assert lines(tmp_path / "parts" / f"seen{rank}") == lines(tmp_path / "whole" / f"seen{rank}") == want
