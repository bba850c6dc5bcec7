"""nanopack tokenize: the same bytes however it is run, only what is missing, and errors that name the place."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
from data_sets import SHIPPED, SMALL
from faulty import is_gone, wait_until

import nanopack
from nanopack import ConversationError, Loader, cli
from nanopack.errors import TemplateError
from nanopack.store import Store, engines, folder, is_store, job
from nanopack.store.check import check
from nanopack.store.tokenize import tokenize
from nanopack.verify import compare

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]}
BAD = {"messages": [{"role": "judge", "content": "no"}]}


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 100 conversations."""
    monkeypatch.setattr(job, "LEAST_CONVERSATIONS", 100)


def written(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.usefixtures("small_parts")
def test_the_bytes_are_the_same_whatever_the_number_of_workers(tmp_path):
    stores = [tokenize(SHIPPED, "chat32k", tmp_path / str(workers), num_workers=workers) for workers in (0, 1, 3)]
    first, *others = (written(Path(store.path)) for store in stores)
    assert len(stores[0].shards) > 10
    assert all(other == first for other in others)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("more", [{}, {"loss": "last", "first_assistant": "drop"}, {"turns": "each"}, {"loss": "all"}])
def test_a_loader_of_the_store_gives_the_batches_of_the_conversations(tmp_path, more):
    tokenize(SHIPPED, SMALL, tmp_path, num_workers=2, **more)
    arguments = dict(batch_size=4, seq_len=512, epochs=1, seed=1, num_workers=0)
    with Loader(SHIPPED, SMALL, **arguments, **more) as loader, Loader(tmp_path, **arguments) as stored:
        assert compare(iter(loader), iter(stored))


@pytest.mark.usefixtures("small_parts")
def test_a_second_run_does_only_what_is_missing_and_a_finished_store_stays_as_it_is(tmp_path, monkeypatch):
    whole = written(Path(tokenize(SHIPPED, "chat32k", tmp_path / "whole", num_workers=0).path))
    made = []
    write_part = job.write_part

    def stops(job, part, on_read):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(part)
        return write_part(job, part, on_read)

    monkeypatch.setattr("nanopack.store.engines.write_part", stops)
    with pytest.raises(KeyboardInterrupt):
        tokenize(SHIPPED, "chat32k", tmp_path / "out", num_workers=0)
    assert not is_store(tmp_path / "out") and made == [0, 1, 2, 3, 4]
    monkeypatch.setattr(
        "nanopack.store.engines.write_part", lambda *given: (made.append(given[1]), write_part(*given))[1]
    )
    for _ in range(2):
        tokenize(SHIPPED, "chat32k", tmp_path / "out", num_workers=0)
        assert written(tmp_path / "out") == whole and made == [*range(len(Store(tmp_path / "whole").shards))]


def test_a_folder_of_other_data_or_arguments_is_refused_by_name(tmp_path, monkeypatch):
    data, out = write_lines(tmp_path / "chats.jsonl", [GOOD] * 3), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("nanopack.store.tokenize.finish_parts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tokenize(data, SMALL, out, num_workers=0)
    with pytest.raises(ValueError, match="template was 'nanochat' and is 'chatml'; give a new folder"):
        tokenize(data, SMALL, out, template="chatml", num_workers=0)
    write_lines(data, [GOOD, GOOD, {"text": "another"}])
    with pytest.raises(ValueError, match=r"chats\.jsonl has changed"):
        tokenize(data, SMALL, out, num_workers=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"mine holds other files, notes\.txt for one"):
        tokenize(data, SMALL, tmp_path / "mine", num_workers=0)


def test_two_runs_into_one_folder_take_turns_and_one_of_other_arguments_is_refused(tmp_path, monkeypatch, caplog):
    data, out, begun, goes_on = [{"text": "a"}] * 2, tmp_path / "out", threading.Event(), threading.Event()
    whole = written(Path(tokenize(data, SMALL, tmp_path / "once", num_workers=0).path))
    write_part = job.write_part

    def waits(*given):
        begun.set()
        assert goes_on.wait(60)
        return write_part(*given)

    monkeypatch.setattr("nanopack.store.engines.write_part", waits)
    with ThreadPoolExecutor(3) as pool:
        run = functools.partial(pool.submit, tokenize, data, SMALL, out, num_workers=0)
        first = run()
        assert begun.wait(60)
        # as where both begin before either has written what it makes
        (out / "parts" / "plan.json").unlink()
        second, other = run(), run(template="chatml")
        deadline = time.monotonic() + 60
        while caplog.text.count("another process is writing into") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        goes_on.set()
        assert len(first.result(60)) == len(second.result(60)) == 2
        with pytest.raises(ValueError, match="template was 'nanochat' and is 'chatml'"):
            other.result(60)
    assert written(out) == whole


def test_a_finished_store_of_other_arguments_is_refused(tmp_path):
    tokenize([GOOD], SMALL, tmp_path, num_workers=0)
    with pytest.raises(ValueError, match="loss was 'assistant' and is 'all'"):
        tokenize([GOOD], SMALL, tmp_path, loss="all", num_workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_conversation_stops_the_run_and_is_named(tmp_path, workers):
    data = write_lines(tmp_path / "chats.jsonl", [GOOD, BAD, GOOD])
    with pytest.raises(ConversationError, match=r"chats\.jsonl:2, message 0: role is 'judge'.*on_error=\"skip\""):
        tokenize(data, SMALL, tmp_path / "out", num_workers=workers)
    assert not is_store(tmp_path / "out")


@pytest.mark.usefixtures("small_parts")
def test_skipped_conversations_are_in_the_quarantine_with_place_and_reason(tmp_path):
    data = write_lines(tmp_path / "chats.jsonl", [BAD if i % 50 == 7 else {**GOOD, "weight": i} for i in range(250)])
    store = tokenize(data, SMALL, tmp_path / "out", on_error="skip", num_workers=2)
    found = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [one["conversation"] for one in found] == [7, 57, 107, 157, 207]
    assert found[0]["where"] == f"{data}:8" and found[0]["reason"].startswith("message 0: role is 'judge'")
    assert (len(store), store.manifest.conversations, store.manifest.skipped) == (245, 250, 5)
    assert store.conversations[7] == 8 and store.where(7) == f"{tmp_path / 'out'}: conversation 8"
    assert store.weights[7] == 8


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (lambda i: 250 <= i < 350, "100 conversations in a row are bad"),
        (lambda i: i % 3 > 0, "of 1200 conversations are bad"),
    ],
)
def test_more_than_a_few_bad_conversations_stop_the_run_also_where_they_lie_in_several_parts(tmp_path, bad, why):
    with pytest.raises(ConversationError, match=f'{why}; on_error="skip" is for a few'):
        tokenize([BAD if bad(i) else GOOD for i in range(1200)], SMALL, tmp_path, on_error="skip", num_workers=0)
    assert not is_store(tmp_path)


def test_a_tokenizer_without_the_templates_tokens_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TemplateError, match="lacks special tokens of template='llama3'"):
        tokenize([GOOD], SMALL, tmp_path / "out", template="llama3", on_error="skip", num_workers=0)
    assert not list(tmp_path.rglob("*.words"))


def test_a_full_disk_is_named_and_leaves_nothing_under_a_final_name(tmp_path):
    """Of files, none may be larger than 64 KB here: the words of a part are."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16));"
        "from nanopack.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = forked.run(script, "tokenize", SHIPPED, out, "--num-workers", 2)
    assert done.returncode == 2 and "part-0" in done.stderr and "File too large" in done.stderr
    assert not [name for name in written(out) if name.endswith((".words", ".tmp"))]
    tokenize(SHIPPED, "chat32k", out)
    assert not check(out)


def test_a_write_that_fails_in_its_middle_removes_what_it_wrote(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; nothing is under this name.*") as caught:
        folder.Folder(tmp_path).write("a.words", [b"abc"])
    assert caught.value.filename == str(tmp_path / "a.words") and caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_write_that_is_killed_in_its_middle_leaves_nothing_under_the_final_name(tmp_path):
    def chunks():
        yield bytes(1 << 16)
        os.kill(os.getpid(), signal.SIGKILL)
        yield b"the rest"

    if (child := os.fork()) == 0:
        try:
            folder.Folder(tmp_path).write("a.words", chunks())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [folder.TEMPORARY]


TOKENIZE = (
    "import sys; from nanopack.store import job, tokenize;"
    "job.LEAST_CONVERSATIONS = 100; print('ready', flush=True);"
    "tokenize.tokenize([sys.argv[1]] * 2, 'chat32k', sys.argv[2], num_workers=2)"
)


def start(script: Path, out: Path) -> forked.Script:
    """Tokenize in a process, in a group of its own, which is about to begin."""
    script.write_text(TOKENIZE)
    process = forked.start(script, SHIPPED, out)
    assert process.stdout.readline() == "ready\n"
    return process


def kill_and_run_again(tmp_path: Path, kills: int) -> None:
    tokenize([SHIPPED] * 2, "chat32k", tmp_path / "once", num_workers=2)
    expected, out, moments = written(tmp_path / "once"), tmp_path / "out", []
    draw, files = random.Random(0), len(written(tmp_path / "once"))
    for _ in range(kills):
        process, moment = start(tmp_path / "script.py", out), draw.randrange(files)
        while process.poll() is None and len([*out.glob("*.words")] if out.exists() else ()) < moment:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = written(out) if out.exists() else {}
        moments.append(len(found))
        # what has a final name is whole
        assert all(expected[name] == content for name, content in found.items() if name in expected)
        if is_store(out) or len([*out.glob("*.words")]) > draw.randrange(files):
            shutil.rmtree(out)
    tokenize([SHIPPED] * 2, "chat32k", out, num_workers=2)
    assert written(out) == expected and len(set(moments)) > kills // 4, moments


@pytest.mark.usefixtures("small_parts")
def test_killed_and_run_again_it_gives_the_same_bytes(tmp_path):
    kill_and_run_again(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_killed_at_20_moments_and_run_again_it_gives_the_same_bytes(tmp_path):
    kill_and_run_again(tmp_path, 20)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys, time; from nanopack.store.tokenize import tokenize\n"
        "class Slow:\n"
        "    def __len__(self): return 2000\n"
        "    def __getitem__(self, i): time.sleep(0.01); return {'text': 'a'}\n"
        "tokenize(Slow(), 'chat32k', sys.argv[1], num_workers=2)"
    )
    process = forked.start(tmp_path / "script.py", tmp_path / "out")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: len(children.read_text().split()) >= 2, 100)
    pids = children.read_text().split()
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert all(map(is_gone, pids)), f"{pids} outlived {process.pid}"


def test_progress_is_reported_where_a_killed_worker_held_the_lock_of_the_count():
    context = multiprocessing.get_context("fork")
    read, reported = context.Value("q", 3), []
    worker = context.Process(target=lambda: (read.get_lock().acquire(), os._exit(0)))
    worker.start()
    worker.join(60)
    report = threading.Thread(target=engines._reporter(read, reported.append), daemon=True)
    report.start()
    report.join(10)
    assert reported == [3]


def test_the_quarantine_numbers_conversations_where_each_answer_is_a_document(tmp_path):
    talk = {"messages": GOOD["messages"] * 2}
    tokenize([talk, BAD, GOOD], SMALL, tmp_path, turns="each", on_error="skip", num_workers=0)
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["conversation"] == 1 and json.loads(line)["where"] == "conversation 1"
    assert Store(tmp_path).conversations.tolist() == [0, 0, 2]


def test_a_killed_worker_is_named_and_the_run_can_be_repeated(tmp_path, monkeypatch):
    def dies(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("nanopack.store.engines.write_part", dies)
        with pytest.raises(nanopack.ProducerError, match="a tokenizing process was killed"):
            tokenize([GOOD], SMALL, tmp_path, num_workers=1)
    assert len(tokenize([GOOD], SMALL, tmp_path, num_workers=1)) == 1


def run(capsys, *argv):
    code = cli.main(list(map(str, argv)))
    return code, *capsys.readouterr()


def test_the_commands_make_check_and_describe_a_store(tmp_path, capsys):
    out = tmp_path / "out"
    code, text, _ = run(capsys, "tokenize", SHIPPED, out, "--num-workers", 0)
    assert code == 0 and "documents   2,486 of 2,486 conversations" in text
    code, text, _ = run(capsys, "store", "info", out, "--json")
    assert code == 0 and json.loads(text)["documents"] == 2486 and json.loads(text)["settings"]["loss"] == "assistant"
    assert run(capsys, "store", "check", out)[:2] == (0, f"{out}: every file is as its manifest says\n")
    file = next(out.glob("*.words"))
    changed = bytearray(file.read_bytes())
    changed[10] ^= 1
    file.write_bytes(changed)
    code, text, _ = run(capsys, "store", "check", out)
    assert code == 1 and f"{file}: expected SHA-256 " in text and len(text.splitlines()) == 1
    code, _, error = run(capsys, "store", "info", tmp_path)
    assert code == 2 and "cannot be read as the manifest of a token store" in error


def test_the_other_commands_read_a_store(tmp_path, capsys):
    tokenize([GOOD] * 5, "chat32k", tmp_path / "known", num_workers=0)
    for command in ("pack", "verify", "inspect"):
        code, text, error = run(capsys, command, tmp_path / "known", "--batch-size", 2, "--seq-len", 32)
        assert code == 0, error
    assert "hi" in text
    tokenize([GOOD], SMALL, tmp_path / "other", num_workers=0)
    code, text, error = run(capsys, "pack", tmp_path / "other", "--batch-size", 1, "--seq-len", 8)
    assert code == 0, error
