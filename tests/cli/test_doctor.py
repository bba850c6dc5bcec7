"""`nanopack doctor` reports what it finds, and fails where a batch would be wrong."""

from __future__ import annotations

import json

import pytest
import torch

from nanopack import Loader, __version__
from nanopack.cli import doctor
from nanopack.ring.slot import Slot

pytestmark = pytest.mark.usefixtures("plain_terminal")


def findings(out):
    return {finding["name"]: (finding["state"], finding["what"]) for finding in json.loads(out)["findings"]}


def test_a_sound_machine_has_no_fault_and_the_report_names_what_a_bug_report_needs(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    for needed in (__version__, torch.__version__, "python", "open files", "start method", "num_workers=1"):
        assert needed in out
    assert "\nfault" not in out
    code, out, _ = run("doctor", "--json")
    assert code == 0
    assert findings(out)["batches on cpu, num_workers=1"] == ("ok", "4 equal to the reference packer's in every field")


def test_a_wrong_batch_is_a_fault_with_its_first_difference(run, monkeypatch):
    fill = Slot.fill

    def flip(self, rows):
        facts = fill(self, rows)
        self.words[self.layout.first_word + 1] ^= 1
        return facts

    monkeypatch.setattr(Slot, "fill", flip)
    code, out, _ = run("doctor", "--json")
    state, what = findings(out)["batches on cpu, num_workers=0"]
    assert (code, state) == (1, "fault")
    assert "batch 0" in what and "inputs" in what


def test_a_loader_that_cannot_be_made_is_a_fault_and_the_other_lines_are_printed_all_the_same(run, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no memory\nto map")

    monkeypatch.setattr(Loader, "__init__", refuse)
    code, out, _ = run("doctor", "--json")
    assert code == 1
    assert findings(out)["batches on cpu, num_workers=0"] == ("fault", "OSError: no memory to map")
    assert findings(out)["tokenizer"][0] == "ok"


def test_a_gpu_that_torch_was_not_built_for_is_a_fault(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "nvidia-smi")
    code, out, _ = run("doctor", "--json")
    assert code == 1
    assert findings(out)["devices"] == (
        "fault",
        "nvidia-smi is here, and torch is built for the CPU; install a CUDA build",
    )
