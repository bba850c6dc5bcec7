"""The example of a training loop: it learns, and it resumes where it was interrupted."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pickle
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from nanopack import Loader, cli, demo

STEPS = 7


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A demo that takes seconds: few conversations, short rows, an evaluation every three steps."""
    few = demo.shipped()[:200]
    monkeypatch.setattr(demo, "shipped", lambda: few)
    for name, value in {"SEQ_LEN": 48, "EVERY": 3, "LAYERS": 1}.items():
        monkeypatch.setattr(demo, name, value)


@functools.cache
def trained(steps):
    """An uninterrupted run, and the bytes of its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        run = demo.train(steps, Path(folder), device="cpu")
        return run, demo.checkpoint(Path(folder)).read_bytes()


@pytest.fixture
def whole(tmp_path):
    run, checkpoint = trained(STEPS)
    (tmp_path / "whole").mkdir()
    demo.checkpoint(tmp_path / "whole").write_bytes(checkpoint)
    return run


def interrupt_at(step):
    def on_step(now):
        if now == step:
            raise KeyboardInterrupt

    return on_step


def test_the_loss_falls_for_conversations_it_has_never_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EVERY", 20)
    run = demo.train(40, tmp_path, device="cpu")
    assert run.held_out[0] == pytest.approx(math.log(265), abs=1e-5)
    assert run.held_out[0] - 1.2 > run.held_out[20] > run.held_out[40]
    assert run.mean_losses()[20] > run.mean_losses()[40]


@pytest.mark.parametrize("step", [4, 6, 7], ids=["between checkpoints", "before a checkpoint", "at the end"])
def test_a_run_interrupted_and_resumed_has_the_same_losses_bit_for_bit(whole, tmp_path, step):
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        demo.train(STEPS, folder, device="cpu", on_step=interrupt_at(step))
    resumed = demo.train(STEPS, folder, resume=True, device="cpu")
    assert (resumed.losses, resumed.held_out) == (whole.losses, whole.held_out)
    ends = [torch.load(demo.checkpoint(tmp_path / name), weights_only=True) for name in ("whole", "cut")]
    assert ends[0]["loader"] == ends[1]["loader"]
    for name, weights in ends[0]["model"].items():
        assert torch.equal(weights, ends[1]["model"][name]), name


def test_more_steps_later_equal_all_steps_at_once(whole, tmp_path):
    demo.train(4, tmp_path / "more", device="cpu")
    resumed = demo.train(STEPS, tmp_path / "more", resume=True, device="cpu")
    assert resumed.losses == whole.losses
    assert set(resumed.held_out.items()) - {(4, resumed.held_out[4])} == set(whole.held_out.items())


def test_the_held_out_loss_is_that_of_every_target_however_batched():
    torch.manual_seed(3)
    model = demo.GPT(265)
    torch.nn.init.normal_(model.head.weight)
    losses = []
    for batch_size in (1, 4):
        settings = {"extras": ("positions", "doc_ids"), "epochs": 1, "device": "cpu", "num_workers": 0}
        with Loader(demo.shipped()[:40], demo.small_tokenizer(), batch_size, 48, **settings) as loader:
            losses.append(demo.evaluate(model, list(loader)))
    # float32, summed in another order
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_no_question_is_both_trained_on_and_held_out():
    parts = demo.split(demo.shipped())
    questions = [{m["content"] for c in part for m in c["messages"][:2] if m["role"] == "user"} for part in parts]
    assert not questions[0] & questions[1] and all(questions)
    assert len(parts[0]) + len(parts[1]) == 200


def test_the_command_trains_reports_and_draws(tmp_path, capsys):
    argv = ["demo-train", "--steps", "6", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["losses"]) == 6 and [*report["held_out"]] == ["0", "3", "6"]
    assert report["written"] == [str(tmp_path / "checkpoint.pt"), str(tmp_path / "curve.png")]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*argv, "--resume"]) == 0
    out = capsys.readouterr().out
    for step, loss in report["held_out"].items():
        assert re.search(rf"^ *{step} .*{loss:.3f} ", out, re.M)


def test_without_matplotlib_the_curve_is_text_and_one_line_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["demo-train", "--steps", "1", "--out", str(tmp_path), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == f"nanopack: {tmp_path / 'curve.png'} needs matplotlib; pip install nanopack-gpu[plot]\n"
    assert re.search(r"^steps  training o  held out x  ", out, re.M) and "curve.png" not in out


def test_there_is_no_resuming_without_a_checkpoint(tmp_path, capsys):
    assert cli.main(["demo-train", "--resume", "--out", str(tmp_path / "no"), "--device", "cpu"]) == 2
    assert "checkpoint.pt does not exist; train without --resume first\n" in capsys.readouterr().err


class Elsewhere:
    """A class that torch.load refuses, since it would have to run the file's code."""


@pytest.fixture
def saved():
    """A checkpoint as a dict, of one step."""
    return torch.load(io.BytesIO(trained(1)[1]), weights_only=True)


OTHERS = {
    "no pickle": lambda path, state: path.write_text("hello world\n"),
    "empty": lambda path, state: path.write_bytes(b""),
    "a plain pickle": lambda path, state: path.write_bytes(pickle.dumps({"model": 1})),
    "a class": lambda path, state: torch.save({"model": Elsewhere()}, path),
    "no dict": lambda path, state: torch.save(torch.ones(3), path),
    "another model": lambda path, state: torch.save({**state, "model": {"head.weight": torch.ones(2)}}, path),
    "another optimizer": lambda path, state: torch.save({**state, "optimizer": {}}, path),
    "without losses": lambda path, state: torch.save({k: v for k, v in state.items() if k != "losses"}, path),
    "half of it": lambda path, state: (torch.save(state, path), os.truncate(path, path.stat().st_size // 2)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_that_is_not_a_checkpoint_of_the_demo_is_refused_in_one_line(saved, tmp_path, capfd, recwarn, other):
    path = demo.checkpoint(tmp_path)
    OTHERS[other](path, saved)
    before = path.read_bytes()
    assert cli.main(["demo-train", "--steps", "2", "--resume", "--out", str(tmp_path), "--device", "cpu"]) == 2
    out, err = capfd.readouterr()
    remedy = "pass --out with the folder of one, or leave out --resume"
    assert (out, err) == ("", f"nanopack: {path} is not a checkpoint of demo-train; {remedy}\n")
    # Python would print them on stderr
    assert not recwarn.list
    assert path.read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused_with_the_loaders_message(saved, tmp_path, capsys):
    path = demo.checkpoint(tmp_path)
    saved["loader"]["fingerprint"]["conversations"] = 5
    torch.save(saved, path)
    assert cli.main(["demo-train", "--steps", "2", "--resume", "--out", str(tmp_path), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert (
        out == "" and err.startswith(f"nanopack: {path}: the state belongs to another run: ") and err.count("\n") == 1
    )
