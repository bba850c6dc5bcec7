"""Promises of Batches.attach: a run of a Trainer stopped or killed resumes with the same batches and losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'nanopack-gpu[hf]'")

from hf_run import Seen, digest, make_trainer
from plain_loop import by_definition, chunks, losses_of_a_plain_loop, needs
from tiny_hf import make_loader, make_model
from transformers import TrainerCallback

from nanopack.adapters.hf import Batches

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.trainers]

SCRIPT = Path(__file__).parents[1] / "support" / "hf_run.py"


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
