"""Ranks without torchrun: processes that are kept between tests and form a group of any size for each task."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_run import BYTES

import nanopack
from nanopack.distributed import of_all_ranks

# Seconds: until a rank that waits for the others gives up, and until the test gives up the ranks.
PATIENCE, TIMEOUT = 10, 40
NOT_CONNECTED = "Gloo connectFullMesh failed"


class Ranks:
    """Up to `most` processes: `ranks(3, function, ...)` calls a function on three, and returns what each returned.

    All of gloo's group have joined before the call, and the group is gone after it. A rank that raises fails the test.
    """

    def __init__(self, most, folder):
        self._most, self._folder, self._count = most, folder, itertools.count()
        self._start()

    def _start(self):
        # each is forked from a clean process that has imported torch: pytest's threads and locks are not theirs
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.checkpoint", "nanopack"])
        self._pipes, self._processes = [], []
        for rank in range(self._most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, world_size, function, /, *args, **arguments):
        # gloo's ranks may fail to connect on a busy machine, where they join or where they make a group
        for _ in range(3):
            answers = self._ask(world_size, function, *args, **arguments)
            if all(joined and NOT_CONNECTED not in (trace or "") for joined, _, trace in answers):
                break
        failures = [f"rank {rank}: {trace}" for rank, (_, _, trace) in enumerate(answers) if trace]
        assert not failures, "\n".join(failures)
        return [result for _, result, _ in answers]

    def _ask(self, world_size, function, /, *args, **arguments):
        """Return of each rank whether it joined, its result and its traceback."""
        store = str(self._folder / f"store{next(self._count)}")
        pipes = self._pipes[:world_size]
        for pipe in pipes:
            pipe.send((store, world_size, function, args, arguments))
        results, late = [], time.monotonic() + TIMEOUT
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(max(0, late - time.monotonic())):
                self.close()
                self._start()
                return [(False, None, f"rank {rank} of {world_size} is not done after {TIMEOUT} s")] * world_size
            results.append(pipe.recv())
        return results

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe, rank):
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            store, world_size, function, args, arguments = pipe.recv()
            patience = timedelta(seconds=PATIENCE)
            try:
                dist.init_process_group("gloo", f"file://{store}", patience, world_size=world_size, rank=rank)
            except RuntimeError:
                pipe.send((False, None, traceback.format_exc()))
                continue
            try:
                answer = True, function(*args, **arguments), None
            except Exception:
                answer = True, None, traceback.format_exc()
            dist.destroy_process_group()
            pipe.send(answer)
    os._exit(0)


CHATS = [{"text": f"{k}, " + "x" * (7 * k % 17)} for k in range(101)]
# What is read by rank 0 of 3 is twenty times as long as what the others read.
UNEVEN = [{"text": "x" * (60 if k % 3 == 0 else 2)} for k in range(20)]
MIXED = nanopack.mixture([(CHATS, 2, "chats"), ([{"text": "x" * k} for k in range(9)], 1, "letters")])


def loader_of(rows, conversations=CHATS, **arguments):
    """A loader of this rank, with `rows` rows on all ranks together; torch.distributed knows the rank."""
    arguments = {"seq_len": 16, "num_workers": 0, **arguments}
    world_size = arguments.get("world_size", dist.get_world_size())
    return nanopack.Loader(conversations, BYTES, rows // world_size, **arguments)


def rows_of(batches):
    """For each batch its rows, to be compared on another process."""
    return [list(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)) for batch in batches]


def default_shard(**arguments):
    """What the rank reads by default, and whether it reads the same when it is given its rank."""
    own = loader_of(12, **arguments)
    given = loader_of(12, **arguments, rank=dist.get_rank(), world_size=dist.get_world_size())
    first = rows_of([next(own)])
    return first, first == rows_of([next(given)]) and own.state_dict() == given.state_dict()


def steps_in_common(grouping, **arguments):
    """Train to the end, meeting the other ranks at each step; return steps, len() and how many batches hold tokens.

    `grouping`: the group is passed, or taken by default, or there is none that fits: the default group has more ranks.
    """
    group = {"passed": dist.group.WORLD, "default": None, "none": None}[grouping]
    meeting = dist.group.WORLD
    if grouping == "none":
        # the last rank shares none of the data, and makes no loader
        rank, world_size = dist.get_rank(), dist.get_world_size() - 1
        meeting = dist.new_group(list(range(world_size)))
        if rank == world_size:
            return None
        arguments |= {"rank": rank, "world_size": world_size}
    with loader_of(3, UNEVEN, **arguments, packing="stream", epochs=2, process_group=group) as loader:
        counted_at_construction = loader._run.known_batches is not None
        assert counted_at_construction == (grouping != "none")
        steps = filled = 0
        for batch in loader:
            filled_ranks = torch.tensor(int(batch.num_tokens > 0))
            dist.all_reduce(filled_ranks, group=meeting)
            assert filled_ranks > 0, "a step in which no rank has anything to train"
            steps, filled = steps + 1, filled + (batch.num_tokens > 0)
        dist.barrier(meeting)
        return steps, len(loader), filled


def wrong_groups():
    """What a loader says to a group that is not that of all ranks."""
    said = []
    pair = dist.new_group([0, 1])
    for changes in ({"rank": 0, "world_size": 2}, {"process_group": pair}, {"epochs": None}):
        try:
            loader_of(3, **{"epochs": 1, "process_group": dist.group.WORLD, **changes})
        except ValueError as error:
            said.append(str(error))
    return said


@contextlib.contextmanager
def logged():
    """The lines that are logged meanwhile."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("nanopack").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("nanopack").removeHandler(handler)


def logged_without_a_fitting_group(world_size):
    """The warnings of a loader with this world size, and whether it counted its batches when it was made."""
    with logged() as lines, loader_of(3, epochs=1, rank=0, world_size=world_size) as loader:
        return lines, loader._run.known_batches is not None


def logged_in_an_endless_run(**of_ranks):
    """The warnings of 70 steps of a loader, whose arguments are given for each rank."""
    own = {name: values[dist.get_rank()] for name, values in of_ranks.items()}
    arguments = {"conversations": CHATS, "tokenizer": BYTES, "num_workers": 0, "batch_size": 2} | own
    with logged() as lines, nanopack.Loader(**arguments, seq_len=16) as loader:
        for _ in range(70):
            next(loader)
            # as training makes the ranks wait for each other
            dist.barrier()
    return lines


def counted_with_a_bad_conversation_of_rank_1():
    """What a loader raises whose rank, or another, cannot count."""
    data = [{"text": "x"} for _ in range(9)]
    data[4] = {"text": 5}
    try:
        loader_of(3, data, epochs=1, process_group=dist.group.WORLD)
    except Exception as error:
        return type(error).__name__, str(error)


def gathered_state(**arguments):
    """The states of all ranks after the second batch, as this rank has them, and the next batch."""
    with loader_of(6, **arguments) as loader:
        next(loader), next(loader)
        state = of_all_ranks(loader.state_dict())
        return state, rows_of([next(loader)])


def save_and_continue(path, steps, more, rows, asynchronous=False, **arguments):
    """Take some steps, save, and return what comes next, and the state that was saved."""
    with loader_of(rows, **arguments) as loader:
        for _ in itertools.islice(loader, steps):
            pass
        state, what = loader.state_dict(), {"loader": loader, "weights": torch.arange(3)}
        if asynchronous:
            saved = dcp.async_save(what, checkpoint_id=path)
        else:
            dcp.save(what, checkpoint_id=path)
        # by next(): iter() after the end would begin another pass
        batches = [batch for _ in range(more) if (batch := next(loader, None)) is not None]
        if asynchronous:
            saved.result()
        return rows_of(batches), state


def load_and_go_on(path, in_vain, more, rows, **arguments):
    """Take some steps, load a state, and return the next batches, and the loader's state after loading."""
    with loader_of(rows, **arguments) as loader:
        for _ in itertools.islice(loader, in_vain):
            pass
        what = {"loader": loader, "weights": torch.zeros(3, dtype=torch.int64)}
        dcp.load(what, checkpoint_id=path)
        assert what["weights"].tolist() == [0, 1, 2]
        state = loader.state_dict()
        return rows_of(itertools.islice(loader, more)), state


def dates_of_a_loader():
    """Return the date that each rank's chat template writes, where the ranks loaded their tokenizers on other days."""
    from tiny_hf import PLAIN, make_tokenizer

    from nanopack.tokenizers.tokenizer import load_tokenizer

    own = load_tokenizer(make_tokenizer("{{ strftime_now('%d') }}" + PLAIN)).at(f"2025-12-1{dist.get_rank()}T10:00:00")
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    how = {"template": "hf", "epochs": 1, "process_group": dist.group.WORLD, "num_workers": 0}
    with nanopack.Loader([chat] * 9, own, 1, 32, **how) as loader:
        return own.clock[:10], loader.tokenizer.decode(next(loader).inputs[0, :2].tolist())[:2]


def refused(**of_ranks):
    """What a loader raises whose ranks have other arguments, given as a list each: those of rank 0, of rank 1, ..."""
    own = {name: values[dist.get_rank()] for name, values in of_ranks.items()}
    arguments = {"batch_size": 2, "conversations": CHATS, "tokenizer": BYTES, "epochs": 1, "num_workers": 0} | own
    try:
        with nanopack.Loader(arguments.pop("conversations"), arguments.pop("tokenizer"), seq_len=16, **arguments):
            return None
    except ValueError as error:
        return str(error)
