"""A data set that opened its file once is read right, by however many processes at once."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile

import pytest
import torch
from covering import only
from faulty import TOKENIZER, within

from nanopack import Loader, mixture, reference
from nanopack.producer.cursors import cursors, own_cursors
from nanopack.verify import compare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")

SMALL = {"batch_size": 4, "seq_len": 256, "packing": "stream", "loss": "all", "epochs": 1, "seed": 3}


class Offsets:
    """The lines of a file, found by their offsets: as it is often written, with one file for all who read."""

    def __init__(self, path):
        self.file = open(path, "rb")  # noqa: SIM115 (as it is often written)
        self.offsets, at = [], 0
        for line in self.file:
            self.offsets.append(at)
            at += len(line)

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, index):
        self.file.seek(self.offsets[index])
        return json.loads(self.file.readline())


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    draw = random.Random(1)
    texts = (f"{k} " + " ".join(f"w{k}x{n}" for n in range(draw.randint(3, 60))) for k in range(3000))
    path = tmp_path_factory.mktemp("offsets") / "chats.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def expected(lines):
    return list(reference.batches(str(lines), TOKENIZER, **SMALL))


def do_nothing(loader, batch):
    pass


def save(loader, batch):
    loader.state_dict()


def count(loader, batch):
    assert len(loader) > 100


def ask(loader, batch):
    assert loader.explain(batch, 0, 3)


# The more processes, the surer one finds the position that another left; the trainer alone reads with `ask`.
SUREST = [(do_nothing, 4), (save, 4), (count, 4), (ask, 4), (ask, 1)]


@pytest.mark.parametrize(("between", "workers"), only(SUREST, [do_nothing, save, count, ask], [1, 2, 4]))
def test_a_data_set_with_one_open_file_gives_what_is_in_the_file(lines, expected, workers, between):
    with within(60), Loader(Offsets(lines), TOKENIZER, num_workers=workers, prefetch=2, **SMALL) as loader:
        got = []
        for batch in loader:
            between(loader, batch)
            got.append(batch)
    assert compare(iter(expected), iter(got)).difference is None


def test_saving_reads_nothing_in_the_trainer_while_the_producer_does(lines):
    with Loader(Offsets(lines), TOKENIZER, **SMALL) as loader:
        fingerprint = loader.state_dict()["fingerprint"]
    data = Offsets(lines)
    with Loader(data, TOKENIZER, **SMALL) as loader:
        data.file.close()
        assert loader.state_dict()["fingerprint"] == fingerprint
        assert next(loader).num_tokens


def in_child(do):
    """What a forked child returns as its exit code."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = do()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_child_reads_on_from_the_position_at_the_fork_and_leaves_the_parent_its_own(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(range(100)))
    with open(path, "rb", buffering=0) as file, tempfile.TemporaryFile(buffering=0) as nameless:
        path.unlink()
        nameless.write(bytes(range(100)))
        file.seek(10)
        nameless.seek(20)
        positions = cursors()
        file.seek(50)

        def read():
            own_cursors(positions)
            return file.read(1)[0] + nameless.read(1)[0]

        assert in_child(read) == 30
        assert (file.tell(), nameless.tell()) == (50, 20)


def test_logs_and_standard_streams_stay_shared(tmp_path):
    with open(tmp_path / "log", "w") as written, open(tmp_path / "log", "a+") as appended:
        assert not {0, 1, 2, written.fileno(), appended.fileno()} & cursors().keys()


class Connected(list):
    """A data set that connected once, in `__init__`."""

    def __init__(self, connection):
        super().__init__([{"text": "a b c"}] * 9)
        self.connection = connection


@contextlib.contextmanager
def open_socket(as_file=False):
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("rb") as file:
        yield file if as_file else ours


@contextlib.contextmanager
def open_pipe():
    reading, writing = os.pipe()
    with open(reading, "rb") as file, open(writing, "wb"):
        yield file


@contextlib.contextmanager
def asked_program():
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        yield program


CONNECTIONS = {
    "socket": open_socket,
    "file of a socket": functools.partial(open_socket, as_file=True),
    "pipe": open_pipe,
    "program": asked_program,
}
DATA_SETS = {
    "alone": Connected,
    "split": lambda connection: torch.utils.data.Subset(Connected(connection), range(9)),
    "mixed": lambda connection: mixture([(Connected(connection), 1), ([{"text": "a"}], 1)]),
}


@pytest.mark.parametrize("make", DATA_SETS.values(), ids=DATA_SETS)
@pytest.mark.parametrize("connect", CONNECTIONS.values(), ids=CONNECTIONS)
def test_a_data_set_with_an_open_connection_is_refused_where_processes_would_share_it(connect, make):
    with connect() as connection:
        data = make(connection)
        for workers, turns in ((1, "all"), (2, "all"), (1, "each")):
            with pytest.raises(ValueError, match=r"'connection' is an open socket or pipe.*num_workers=0"):
                Loader(data, "chat32k", 1, 8, num_workers=workers, turns=turns)
        with Loader(data, "chat32k", 1, 8, num_workers=0, loss="all") as loader:
            next(loader)
    with Loader(make(None), "chat32k", 1, 8, loss="all") as loader:
        next(loader)


def test_what_a_data_set_only_writes_to_may_be_shared():
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb") as file:
        for shared in (file, sys.stdout):
            with Loader(Connected(shared), "chat32k", 1, 8, loss="all") as loader:
                next(loader)
