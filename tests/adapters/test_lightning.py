"""Promises of nanopack/adapters/lightning.py: each batch is trained once, whatever Lightning fetched or saved."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopack import Batch, Loader

pytest.importorskip("lightning", reason="needs lightning: pip install 'nanopack-gpu[lightning]'")

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_run import Trained, make_loader, make_trainer, saved_every

from nanopack.adapters.lightning import Batches

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|GPU available|in the `DataLoader`).*"),
]


class Stop(Callback):
    """Ends the training after a number of batches, as a power cut does: nothing is saved."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            raise Cut


class Cut(Exception):
    pass


def expected(count: int, **arguments: Any) -> list[tuple[int, list[list[int]]]]:
    """What a loader alone gives."""
    with make_loader(**arguments) as loader:
        return [(batch.step, batch.inputs.tolist()) for batch, _ in zip(loader, range(count), strict=False)]


@pytest.mark.parametrize(
    ("loader", "trainer"),
    [
        ({}, {"max_steps": 10}),
        ({}, {"max_steps": 10, "limit_train_batches": 7}),
        ({}, {"max_epochs": 1, "limit_train_batches": 10}),
        ({"num_workers": 1}, {"max_steps": 10}),
        ({"epochs": 1}, {"max_epochs": 1}),
    ],
    ids=["endless", "endless in epochs of 7", "sized", "a producer process", "to the end of the data"],
)
def test_a_run_cut_off_resumes_from_its_checkpoint_with_the_batch_after_the_one_trained_last(
    loader, trainer, tmp_path, recwarn
):
    def make() -> Loader:
        return make_loader(**loader)

    whole = Trained()
    make_trainer(tmp_path, **trainer).fit(whole, datamodule=Batches(make))
    assert whole.seen == expected(10 if "epochs" not in loader else 10**6, **loader)
    assert len(whole.seen) >= 10
    assert all(map(math.isfinite, whole.losses))
    assert sum(whole.losses[-3:]) < sum(whole.losses[:3])

    first = Trained()
    with pytest.raises(Cut):
        # batches 5 and 6 are trained, and lost: the checkpoint is that of 4
        make_trainer(tmp_path, saved_every(4, tmp_path), Stop(6), **trainer).fit(first, datamodule=Batches(make))
    assert first.seen == whole.seen[:6]
    second = Trained()
    make_trainer(tmp_path, **trainer).fit(second, datamodule=Batches(make), ckpt_path=tmp_path / "step=4.ckpt")
    assert second.seen == whole.seen[4:]
    assert second.losses == whole.losses[4:]
    assert not [w for w in recwarn if "not resumable" in str(w.message)]


def test_the_state_saved_is_that_of_the_batch_trained_though_one_more_was_fetched(tmp_path):
    steps = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            data = trainer.datamodule
            steps.append((data.state_dict()["step"], data.loader.state_dict()["step"]))

    make_trainer(tmp_path, Look(), max_steps=3).fit(Trained(), datamodule=Batches(make_loader))
    # without the second column being ahead this would prove nothing
    assert steps == [(1, 2), (2, 3), (3, 4)]


def test_a_checkpoint_at_the_end_of_an_epoch_goes_on_too(tmp_path):
    """There Lightning gives a loader no state back; a data module it does."""
    trainer = {"max_epochs": 3, "limit_train_batches": 3}
    ends = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    make_trainer(tmp_path, ends, **trainer).fit(Trained(), datamodule=Batches(make_loader))
    second = Trained()
    make_trainer(tmp_path, **trainer).fit(second, datamodule=Batches(make_loader), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert second.seen == expected(9)[3:]


def test_a_second_fit_goes_on_where_the_first_ended(tmp_path):
    data, model = Batches(make_loader), Trained()
    for _ in range(2):
        make_trainer(tmp_path, max_steps=3).fit(model, datamodule=data)
    assert model.seen == expected(6)
    assert data.loader.ledger()["balanced"]


def test_half_precision_and_other_loaders_for_validation_are_lightnings_own(tmp_path):
    class WithValidation(Batches):
        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(4), batch_size=2)

    class ValidatedOnTensors(Trained):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.validated = batch

    model = ValidatedOnTensors()
    make_trainer(tmp_path, max_steps=2, precision="bf16-true").fit(model, datamodule=WithValidation(make_loader))
    assert model.seen == expected(2)
    assert torch.equal(model.validated, torch.ones(2, dtype=torch.bfloat16))


class Validated(Trained):
    """Notes the steps of each validation, the sanity check's among them."""

    def __init__(self) -> None:
        super().__init__()
        self.validations: list[list[int]] = []

    def on_validation_epoch_start(self) -> None:
        self.validations.append([])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validations[-1].append(batch.step)
        self.log("val_loss", float(batch.num_loss_tokens))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_three_epochs_are_three_passes_each_validated_on_all_of_the_validation_data(num_workers, tmp_path):
    a_pass = len(expected(10**6, epochs=1))
    model = Validated()
    data = Batches(
        lambda: make_loader(epochs=1, num_workers=num_workers),
        validation=lambda: make_loader(epochs=1, batch_size=1, num_workers=num_workers),
    )
    make_trainer(tmp_path, max_epochs=3, num_sanity_val_steps=2).fit(model, datamodule=data)
    assert model.seen == expected(10**6, epochs=1) * 3 and a_pass > 5
    with make_loader(epochs=1, batch_size=1) as loader:
        all_of_it = [batch.step for batch in loader]
    assert model.validations == [all_of_it[:2], *[all_of_it] * 3]


def test_validation_that_is_limited_sees_the_same_batches_each_time(tmp_path):
    model = Validated()
    data = Batches(lambda: make_loader(epochs=1), validation=lambda: make_loader(epochs=1))
    make_trainer(tmp_path, max_epochs=2, limit_val_batches=3, val_check_interval=4, num_sanity_val_steps=0).fit(
        model, datamodule=data
    )
    assert len(model.validations) > 2 and all(seen == [0, 1, 2] for seen in model.validations)


def test_overfit_batches_trains_the_same_batches_in_each_epoch(tmp_path):
    for loader in ({}, {"epochs": 1}):
        model = Trained()
        data = Batches(lambda loader=loader: make_loader(**loader))
        make_trainer(tmp_path, max_epochs=3, overfit_batches=4).fit(model, datamodule=data)
        assert [step for step, _ in model.seen] == [0, 1, 2, 3] * 3


def test_max_steps_beyond_a_pass_begins_another(tmp_path):
    model, a_pass = Trained(), expected(10**6, epochs=1)
    make_trainer(tmp_path, max_steps=len(a_pass) + 3).fit(model, datamodule=Batches(lambda: make_loader(epochs=1)))
    assert model.seen == [*a_pass, *a_pass[:3]]


def test_a_run_resumed_in_its_second_pass_trains_what_an_uninterrupted_one_does(tmp_path):
    a_pass = len(expected(10**6, epochs=1))
    for steps in (a_pass, a_pass + 3):
        folder = tmp_path / str(steps)

        def make() -> Loader:
            return make_loader(epochs=1, num_workers=1)

        whole, second = Trained(), Trained()
        make_trainer(folder, saved_every(steps, folder), max_epochs=3).fit(whole, datamodule=Batches(make))
        make_trainer(folder, max_epochs=3).fit(
            second, datamodule=Batches(make), ckpt_path=folder / f"step={steps}.ckpt"
        )
        assert second.seen == whole.seen[steps:] and len(second.seen) > a_pass
        assert second.losses == whole.losses[steps:]


def test_the_length_is_known_where_the_loaders_is(tmp_path):
    data = Batches(lambda: make_loader(epochs=1))
    assert data
    with pytest.raises(TypeError, match=r"before trainer\.fit"):
        len(data)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Trained(), datamodule=data)
    assert trainer.num_training_batches == len(expected(10**6, epochs=1))


def test_the_loader_itself_is_refused_with_the_remedy(tmp_path):
    with make_loader() as loader, pytest.raises(TypeError, match=r"nanopack\.adapters\.lightning"):
        make_trainer(tmp_path, max_steps=1).fit(Trained(), train_dataloaders=loader)


def test_static_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="static=True"):
        make_trainer(tmp_path, max_steps=1).fit(Trained(), datamodule=Batches(lambda: make_loader(static=True)))


def test_under_torchrun_each_rank_has_its_share_and_the_checkpoint_the_states_of_all(tmp_path):
    """Lightning saves what rank 0 holds."""
    script = Path(__file__).parents[1] / "support" / "lightning_run.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        first, second = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        whole = expected(5, rank=rank, world_size=2)
        assert (first, second) == (whole[:3], whole[2:])
