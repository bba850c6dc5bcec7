"""Promises of nanopack/adapters/hf.py: transformers trains on all of the Loader's targets, and documents stay apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from tiny_hf import DATA, MARKED, make_core, make_loader, make_model, make_tokenizer

from nanopack.adapters.hf import Batches, model_inputs


def loss_of_each(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The loss of every label, (B, columns - 1); column c is that of the label in column c + 1."""
    logits = model(**inputs).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)


# The dicts


def test_rows_have_a_column_more_and_the_models_own_shift_gives_the_loaders_targets():
    with make_loader(packing="stream", template="chatml") as loader:
        for batch, _ in zip(loader, range(5), strict=False):
            found = model_inputs(batch)
            assert found.pop("use_cache") is False
            assert {name: (t.shape, t.dtype) for name, t in found.items()} == dict.fromkeys(
                ("input_ids", "labels", "position_ids"), ((4, 128), torch.int64)
            )
            assert torch.equal(found["labels"][:, 1:], batch.targets)
            assert torch.equal(found["input_ids"][:, :-1], batch.inputs.long())
            assert torch.equal(found["position_ids"][:, :-1], batch.positions.long())
            assert (found["labels"][:, 0] == -100).all()
            # Where a label is in the loss the column holds that token: a label is the token it stands under.
            trained = found["labels"] != -100
            assert torch.equal(found["input_ids"][trained], found["labels"][trained])
            assert int(trained.sum()) == batch.num_loss_tokens > 0


def test_every_trained_token_of_the_data_is_a_label():
    tokenizer, trained = make_tokenizer(MARKED), 0
    for record in DATA[:-2]:
        found = tokenizer.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
        trained += sum(found["assistant_masks"])
    with make_loader(DATA[:-2], batch_size=1, seq_len=16383, epochs=1) as loader:
        labels = sum(int((inputs["labels"] != -100).sum()) for inputs in Batches(loader))
        assert loader.ledger()["tokens"]["cut"] == {}
    assert labels == trained > 1000


def test_static_batches_may_be_kept():
    with make_loader(static=True) as loader, make_loader() as fresh:
        kept = [inputs for inputs, _ in zip(Batches(loader), range(3), strict=False)]
        for inputs, batch in zip(kept, fresh, strict=False):
            assert torch.equal(inputs["labels"], model_inputs(batch)["labels"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"extras": ()}, r"extras=\(\) lacks \"positions\""),
        ({"ignore_index": -1}, "ignore_index=-1: transformers ignores -100"),
    ],
    ids=str,
)
def test_a_loader_whose_batches_do_not_fit_is_refused(arguments, error):
    with make_loader(**arguments) as loader:
        with pytest.raises(ValueError, match=error):
            Batches(loader)
        if "extras" in arguments:
            with pytest.raises(ValueError, match=r"extras=\(\"positions\",\)"):
                model_inputs(next(loader))


def test_weights_that_the_models_own_loss_would_ignore_are_refused():
    with make_loader(loss_weights="token") as loader:
        with pytest.raises(ValueError, match=r"loss_weights='token'.*attach"):
            next(iter(Batches(loader)))
        with pytest.raises(ValueError, match="weighted_loss"):
            model_inputs(next(loader))


# The losses


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("packing", ["best_fit", "pad", "stream"])
def test_a_packed_token_has_the_loss_that_it_has_when_its_conversation_is_alone(packing, attention):
    model = make_model(attention).eval()
    compared = 0
    with make_loader(packing=packing, max_document_tokens=100) as loader, torch.no_grad():
        for batch in [next(loader) for _ in range(3)]:
            packed = loss_of_each(model, model_inputs(batch))
            for row, pieces in enumerate(batch.word_pieces):
                for piece in pieces:
                    if piece.offset or piece.length < 2:
                        # The stream cuts documents: what stands in the next row does not see its beginning.
                        continue
                    alone = alone_in_a_row(piece.conversation, piece.length)
                    # The first token of a document is predicted from nothing where it is alone.
                    expected = loss_of_each(model, alone)[0]
                    got = packed[row, piece.start : piece.start + piece.length - 1]
                    # Another shape of attention adds in another order.
                    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
                    compared += int((alone["labels"] != -100).sum())
    assert compared > 200


def alone_in_a_row(conversation: int, length: int) -> dict[str, torch.Tensor]:
    """The conversation as transformers itself has it: no packing, no padding, nothing of nanopack's."""
    record = DATA[conversation]
    if "text" in record:
        ids = [0, *make_core().encode(record["text"]).ids]
        mask = [1] * len(ids)
    else:
        tokenizer = make_tokenizer(MARKED)
        found = tokenizer.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = found["input_ids"], found["assistant_masks"]
    labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
    rows = {"input_ids": ids, "labels": labels}
    return {name: torch.tensor([row[:length]]) for name, row in rows.items()}


def test_the_models_own_loss_is_the_sum_over_the_targets_divided_by_the_hosts_count():
    model = make_model(dtype=torch.float64).eval()
    with make_loader() as loader, torch.no_grad():
        batch = next(loader)
        inputs = model_inputs(batch)
        summed = loss_of_each(model, inputs).sum().item()
        loss = model(**inputs, num_items_in_batch=batch.num_loss_tokens).loss.item()
    assert math.isclose(loss, summed / batch.num_loss_tokens, rel_tol=1e-5)


@pytest.mark.parametrize("change", [{"use_cache": True}, {"attention_mask": torch.ones(4, 128)}], ids=["cache", "mask"])
def test_documents_would_see_each_other_otherwise(change):
    """Why there is no mask and no cache; and without it the comparison above would prove nothing."""
    model = make_model().eval()
    with make_loader(packing="stream") as loader, torch.no_grad():
        inputs = model_inputs(next(loader))
        apart = model(**inputs).logits
        mixed = model(**inputs | change).logits
    assert (apart - mixed).abs().max() > 1e-3


# The trainers


@pytest.mark.trainers
def test_accelerate_trains_in_a_loop_of_ones_own():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'nanopack-gpu[hf]'")
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    losses = []
    with make_loader(batch_size=8) as loader:
        for batch, _ in zip(loader, range(20), strict=False):
            loss = model(**model_inputs(batch), num_items_in_batch=batch.num_loss_tokens).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert_learned(losses)


def assert_learned(losses: list[float]) -> None:
    assert len(losses) == 20
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(math.log(1001), abs=0.2)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5


@pytest.mark.trainers
def test_a_run_in_accelerate_goes_on_from_its_checkpoint_as_if_it_had_not_ended(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'nanopack-gpu[hf]'")

    def run(steps: int, *, load: bool = False, save_after: int = 0) -> tuple[list[Any], list[float]]:
        """Train; return the tokens of each batch, and its loss."""
        seen, losses = [], []
        accelerator = accelerate.Accelerator(cpu=True)
        with make_loader(seed=1) as loader:
            model = make_model()
            model, optimizer, batches = accelerator.prepare(
                model, torch.optim.AdamW(model.parameters(), lr=3e-3), Batches(loader)
            )
            accelerator.register_for_checkpointing(batches)
            if load:
                accelerator.load_state(tmp_path)
            for inputs, _ in zip(batches, range(steps), strict=False):
                loss = model(**inputs).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                seen.append(inputs["input_ids"].tolist())
                losses.append(loss.item())
                if len(seen) == save_after:
                    accelerator.save_state(tmp_path)
        return seen, losses

    seen, losses = run(10)
    assert len(seen) == 10 and all(map(math.isfinite, losses))
    # what was trained after the checkpoint is lost, and trained again
    assert run(6, save_after=4) == (seen[:6], losses[:6])
    assert run(6, load=True) == (seen[4:], losses[4:])


def trainer_arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 20,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "gradient_accumulation_steps": 2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.trainers
def test_transformers_trainer_trains_on_the_loaders_batches(tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'nanopack-gpu[hf]'")
    from transformers import Trainer, TrainingArguments

    with make_loader(batch_size=8) as loader:
        trainer = Trainer(make_model(), TrainingArguments(**trainer_arguments(tmp_path)))
        trainer.get_train_dataloader = lambda: Batches(loader)
        trainer.train()
        # Two batches a step, none skipped, none fetched and dropped.
        assert next(loader).step == 40
    assert_learned(losses_of(trainer))


@pytest.mark.trainers
def test_its_first_loss_is_that_of_all_targets_of_both_batches(tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'nanopack-gpu[hf]'")
    from transformers import Trainer, TrainingArguments

    with make_loader() as loader:
        trainer = Trainer(make_model(), TrainingArguments(**trainer_arguments(tmp_path) | {"max_steps": 1}))
        trainer.get_train_dataloader = lambda: Batches(loader)
        trainer.train()
    with make_loader() as loader, torch.no_grad():
        two = [next(loader), next(loader)]
        summed = sum(loss_of_each(make_model(), model_inputs(batch)).sum().item() for batch in two)
    expected = summed / sum(batch.num_loss_tokens for batch in two)
    # float32, added in another order.
    assert losses_of(trainer)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.trainers
def test_trls_sft_trainer_trains_on_the_loaders_batches(tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl: pip install 'nanopack-gpu[hf]'")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    untouched = datasets.Dataset.from_list([{"input_ids": [0], "labels": [0]}])
    arguments = trainer_arguments(tmp_path) | {"dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False}
    with make_loader(batch_size=8) as loader:
        trainer = trl.SFTTrainer(
            make_model(), trl.SFTConfig(**arguments), train_dataset=untouched, processing_class=make_tokenizer(MARKED)
        )
        trainer.get_train_dataloader = lambda: Batches(loader)
        trainer.train()
    assert_learned(losses_of(trainer))
