"""The examples run, and do what they say."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from data_sets import SHIPPED

from nanopack import demo

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SUPPORT = Path(__file__).parent / "support"


def run(*arguments, cwd=None, timeout=240):
    done = forked.run(*arguments, cwd=cwd, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(SHIPPED.read_text(encoding="utf-8").splitlines()[:600]))
    return path


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_read_at_once(example):
    code = re.sub(r'^""".*?"""\n', "", example.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(code.splitlines()) <= 60


@pytest.mark.trainers
def test_ddp_resumed_on_the_same_ranks_has_the_losses_of_one_run_and_falls(chats, tmp_path):
    def losses(folder, steps, ranks):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        example = [EXAMPLES / "ddp.py", chats, "--steps", str(steps), "--checkpoint", folder / "c.pt"]
        done = subprocess.run([*launcher, *example], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    for folder in ("whole", "parts", "more"):
        (tmp_path / folder).mkdir()
    whole = losses(tmp_path / "whole", 10, 2)
    assert losses(tmp_path / "parts", 4, 2) == whole[:4]
    (tmp_path / "more" / "c.pt").write_bytes((tmp_path / "parts" / "c.pt").read_bytes())
    assert losses(tmp_path / "parts", 10, 2) == whole[4:]
    first, *_, last = (float(line.split()[-1]) for line in whole)
    assert last < first
    # another number of ranks has the same rows, and adds the same numbers in another order
    on_one = [float(line.split()[-1]) for line in losses(tmp_path / "more", 10, 1)]
    assert on_one == pytest.approx([float(line.split()[-1]) for line in whole[4:]], rel=1e-4)


# A script of nanochat's shape: its generators, as nanochat_loops.py writes them down, and its way to take batches.
SCRIPT = """
import sys
sys.path.insert(0, {support!r})
from types import SimpleNamespace
from functools import partial
import torch
import nanochat_loops
from nanopack.tokenizers.tokenizer import load_tokenizer
encoding = load_tokenizer("chat32k").encoding
tokenizer = SimpleNamespace(enc=encoding)
args = SimpleNamespace(device_batch_size=2, max_seq_len=64, num_iterations=-1)
device, ddp_rank, ddp_world_size = torch.device("cpu"), 0, 1
def chat(i):
    return [{{"role": "user", "content": "Is it %d?" % i}}, {{"role": "assistant", "content": "yes " * (i % 9 + 1)}}]
train_dataset = val_dataset = [{{"messages": chat(i)}} for i in range(60)]
last_step, approx_progress, current_epoch = False, 0.0, 1
def sft_data_generator_bos_bestfit(split):
    global last_step, approx_progress, current_epoch
    render = partial(nanochat_loops.render, encoding)
    made = nanochat_loops.sft(train_dataset, render, 2, 64, 0, 1)
    for inputs, targets, approx_progress, last_step, current_epoch in made:
        yield torch.tensor(inputs, dtype=torch.int32), torch.tensor(targets)
train_loader = sft_data_generator_bos_bestfit("train")
build_val_loader = lambda: sft_data_generator_bos_bestfit("val")
progress = 0
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(32768, 8), torch.nn.Linear(8, 32768))
x, y = next(train_loader) # prefetch the very first batch of data
while not last_step:
    loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    loss.backward()
    # torch.optim imports the compiler, which takes two seconds
    for weight in model.parameters():
        weight.data -= weight.grad
        weight.grad = None
    x, y = next(train_loader) # prefetch the next batch
    print(loss.item().hex(), approx_progress, current_epoch)
print("validation", sum(int(y.sum()) for x, y in (next(build_val_loader()) for _ in range(3))))
print(type(train_loader).__module__, train_loader.gi_code.co_filename)
"""


def test_a_script_of_nanochats_has_the_losses_and_progress_that_it_had(tmp_path):
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    for path in (before, after):
        path.write_text(SCRIPT.format(support=str(SUPPORT)))
    run(EXAMPLES / "nanochat_patch.py", after)
    *expected, own = run(before).splitlines()
    *got, ours = run(after).splitlines()
    assert got == expected and len(expected) > 3
    assert own != ours and "nanopack" in ours


def test_a_script_that_is_not_nanochats_is_refused():
    found = importlib.util.spec_from_file_location("nanochat_patch", EXAMPLES / "nanochat_patch.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    with pytest.raises(ValueError, match="as nanochat's do"):
        module.patched("x, y = next(train_loader)\n")


@pytest.mark.trainers
def test_trl_resumed_has_the_losses_of_one_run(chats, tmp_path):
    pytest.importorskip("trl", reason="needs trl: pip install 'nanopack-gpu[hf]'")
    from tiny_hf import MARKED, make_model, make_tokenizer, shipped

    chats.write_text("".join(json.dumps(record) + "\n" for record in shipped(300)))
    model = tmp_path / "model"
    make_model().save_pretrained(model)
    make_tokenizer(MARKED).save_pretrained(model)
    example = EXAMPLES / "trl_sft.py"
    whole = run(example, model, chats, "--steps", 20, "--out", tmp_path / "a", cwd=tmp_path)
    # as if the run had been killed between its two checkpoints
    shutil.copytree(tmp_path / "a" / "checkpoint-10", tmp_path / "b" / "checkpoint-10")
    resumed = run(example, model, chats, "--steps", 20, "--out", tmp_path / "b", "--resume", cwd=tmp_path)
    assert re.findall("loss [0-9.]+ tokens [0-9]+", whole) == re.findall("loss [0-9.]+ tokens [0-9]+", resumed) != []


@pytest.mark.parametrize("small", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["small", "its own sizes"])
def test_the_tour_prints_what_it_shows(monkeypatch, small):
    if small:
        # the model that it trains: only its losses are not compared
        for name, value in {"SEQ_LEN": 64, "LAYERS": 1}.items():
            monkeypatch.setattr(demo, name, value)
    cells = [
        cell
        for cell in json.loads((EXAMPLES / "tour.ipynb").read_text("utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    names: dict = {}
    for cell in cells:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), names)
        shown = "".join(text for out in cell["outputs"] if out["output_type"] == "stream" for text in out["text"])
        if "train(100" not in "".join(cell["source"]):
            assert printed.getvalue() == shown
    # losses are those of the machine
    losses = [float(loss) for loss in re.findall(r"chats ([0-9.]+)", printed.getvalue())]
    assert len(losses) == 5 and losses[-1] < 0.7 * losses[0]


def test_a_store_is_made_once_and_its_batches_are_trained(chats, tmp_path):
    example = [EXAMPLES / "store_resident.py", chats, "--store", tmp_path / "tokens"]
    first = run(*example).splitlines()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").rglob("*")}
    assert run(*example, "--steps", 5).splitlines()[:5] == first[:5]
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").rglob("*")}
    losses = [float(line.split()[-1]) for line in first[:-1]]
    assert len(losses) == 20 and losses[-1] < losses[0]
    # B * T words of 16 bits would be more
    assert int(first[-1].split()[0].replace(",", "")) < 2 * 4 * 256
