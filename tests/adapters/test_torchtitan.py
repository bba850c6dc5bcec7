"""Promises of nanopack/adapters/torchtitan.py: torchtitan's own trainer trains, validates and resumes on the loader."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan", reason="needs torchtitan: pip install 'nanopack-gpu[torchtitan]'")

import tyro
from tiny_hf import make_core
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX

from nanopack import Batch, reference
from nanopack.adapters.torchtitan import PackedDataLoader

pytestmark = pytest.mark.trainers

SCRIPT = Path(__file__).parents[1] / "support" / "torchtitan_run.py"
CHATS = [
    [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"{2 * i}. " * (i % 5 + 1)}]
    for i in range(60)
]
ARGUMENTS = {"template": "chatml", "seed": 1, "num_workers": 0}
# what the trainer gives to `build`
RUNTIME = {"dp_world_size": 1, "dp_rank": 0, "seq_len": 64, "local_batch_size": 2, "snapshot_every_n_steps": 4}


def make(**fields: Any) -> PackedDataLoader:
    config = PackedDataLoader.Config(conversations=lambda: CHATS, arguments=ARGUMENTS)
    return dataclasses.replace(config, **fields).build(tokenizer=make_core(), **RUNTIME)


def by_definition(chats: Any = CHATS, **arguments: Any) -> Any:
    return reference.batches(
        chats, make_core(), batch_size=2, seq_len=64, extras=("positions",), template="chatml", seed=1, **arguments
    )


def assert_same(found: Any, batch: Batch) -> None:
    inputs, labels = found
    assert inputs.keys() == {"input", "positions"}
    for got in (inputs["input"], inputs["positions"], labels):
        assert got.dtype == torch.int64 and got.device.type == "cpu" and got.shape == (2, 64)
    assert torch.equal(inputs["input"], batch.inputs.long()) and torch.equal(labels, batch.targets)
    assert torch.equal(inputs["positions"], batch.positions.long())


def test_it_is_a_data_loader_of_torchtitan_and_its_batches_are_the_references():
    loader = make()
    assert isinstance(loader, BaseDataLoader) and IGNORE_INDEX == -100
    for found, batch in itertools.islice(zip(loader, by_definition(), strict=False), 20):
        assert_same(found, batch)
    loader.close()


def test_a_finite_one_ends_and_begins_again():
    want = len(list(by_definition(epochs=1)))
    loader = make(infinite=False)
    assert [len(list(loader)) for _ in range(2)] == [want, want]
    twice = make(infinite=False, arguments={**ARGUMENTS, "epochs": 2})
    assert len(list(twice)) == len(list(by_definition(epochs=2)))


def test_its_config_is_taken_by_the_command_line_and_the_log():
    config = PackedDataLoader.Config(dataset_path="none.jsonl", arguments=ARGUMENTS)
    parsed = tyro.cli(PackedDataLoader.Config, default=config, args=["--dataset-path", "some.jsonl"])
    assert parsed == dataclasses.replace(config, dataset_path="some.jsonl")
    assert parsed.to_dict()["arguments"] == ARGUMENTS


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"arguments": {"loss_weights": "token"}}, "loss_weights='token'.*leave it out"),
        ({"arguments": {"ignore_index": -1}}, "ignore_index=-1.*leave it out"),
        ({"conversations": None}, "either dataset_path or conversations"),
        ({"dataset_path": "some.jsonl"}, "either dataset_path or conversations"),
    ],
    ids=str,
)
def test_what_torchtitan_would_get_wrong_is_refused(fields, error):
    with pytest.raises(ValueError, match=error):
        make(**fields)


def test_a_state_resumes_and_an_empty_one_is_none():
    first, second = make(), make()
    before = list(itertools.islice(first, 3))
    second.load_state_dict({})
    second.load_state_dict(first.state_dict())
    for found, batch in zip(itertools.chain(before, second), itertools.islice(by_definition(), 10), strict=False):
        assert_same(found, batch)


def run(folder: Path, *cut: str) -> int:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(SCRIPT)]
    done = subprocess.run([*command, str(folder), *cut], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 or cut, done.stderr[-3000:]
    return done.returncode


def test_torchtitans_trainer_trains_validates_and_resumes(tmp_path):
    run(tmp_path / "whole")
    assert run(tmp_path / "cut", "5") != 0
    run(tmp_path / "cut")

    def lines(run: str, file: str) -> list[str]:
        return (tmp_path / run / file).read_text().splitlines()

    # six steps of two micro-batches; the cut run fetches those of the step that it dies in once more
    labels = [str(batch.targets.flatten().tolist()) for batch in itertools.islice(by_definition(), 12)]
    assert lines("whole", "seen") == labels
    assert lines("cut", "seen") == [*labels[:10], *labels[8:]]
    assert lines("cut", "losses") == lines("whole", "losses") and len(lines("whole", "losses")) == 9
    held_out = [str(batch.targets.flatten().tolist()) for batch in by_definition(CHATS[:20], epochs=1)]
    assert lines("whole", "validated") == held_out * 3
