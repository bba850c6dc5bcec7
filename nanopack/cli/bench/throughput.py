"""How many tokens a second become batches, compared with nanochat's generators and the tokenizer alone?

    chats   ->   loader, generators, bare tiktoken, alternating   ->   tokens per second, and ratios

All start from the same conversations in memory, B=32, T=2048, on the CPU, cut to 2048 tokens. A loader's ring is
emptied before the clock starts, so that no batch made earlier counts.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

from nanopack.cli.bench import nanochat
from nanopack.cli.bench.corpus import ROW, ROWS, Data
from nanopack.cli.bench.rounds import (
    Measure,
    Pace,
    Result,
    Spread,
    Table,
    Work,
    in_rounds,
    not_measured,
    ratio,
    spreads,
    tokens_per_s,
)
from nanopack.cli.bench.tokenizer_bound import CALLS, REGROUPED, bare
from nanopack.loader import Loader

LOADERS: dict[str, dict[str, Any]] = {
    "nanopack, num_workers=0": {"num_workers": 0},
    "nanopack, num_workers=1": {"num_workers": 1},
    "nanopack, num_workers=2": {"num_workers": 2},
    "nanopack, num_workers=1, stream": {"num_workers": 1, "packing": "stream", "loss": "all"},
    "nanopack, num_workers=1, best_fit_pad": {"num_workers": 1, "packing": "best_fit_pad"},
}
FAST: dict[str, dict[str, Any]] = {
    "nanopack, encoder=fast, num_workers=0": {"num_workers": 0, "encoder": "fast"},
    "nanopack, encoder=fast, num_workers=2": {"num_workers": 2, "encoder": "fast"},
}
NO_FAST = "splintr-rs is not installed; pip install nanopack-gpu[fast]"
MIDTRAINING, SFT = "nanochat midtraining", "nanochat SFT"
PROCESSES = (1, 2)


@contextlib.contextmanager
def loader(data: Data, **settings: Any) -> Iterator[Work]:
    """Open a loader over the chats; yield what fetches a batch."""
    with Loader(data.chats, data.tokenizer, ROWS, ROW, max_document_tokens=ROW, device="cpu", **settings) as batches:
        yield lambda: next(batches).num_tokens


@contextlib.contextmanager
def generator(data: Data, make: Any) -> Iterator[Work]:
    """Start one of nanochat's generators; yield what fetches a batch."""
    batches = make(data.chats, nanochat.renderer(data.tokenizer.encoding), ROWS, ROW)
    yield lambda: int(next(batches)[2])


def measure(data: Data, pace: Pace) -> list[Table]:
    """Return tokens per second of each contender, and its ratios to the bound and to each generator."""
    contenders: dict[str, Measure[float]] = {}
    fast = importlib.util.find_spec("splintr") is not None
    for name, settings in (LOADERS | FAST if fast else LOADERS).items():
        contenders[name] = tokens_per_s(partial(loader, data, **settings), warm=pace.drain)
    for name, make in ((MIDTRAINING, nanochat.midtraining), (SFT, nanochat.sft)):
        contenders[name] = tokens_per_s(partial(generator, data, make), warm=1)
    for processes in PROCESSES:
        for call in (*CALLS, REGROUPED):
            contenders[_bare(processes, call)] = bare(data, call, processes)
    without = [] if fast else [not_measured(name, NO_FAST) for name in FAST]
    return [
        Table(
            "From conversations to batches (of n processes: of the faster call of tiktoken alone)",
            rows(spreads(in_rounds(contenders, pace))) + without,
        )
    ]


def _bare(processes: int, call: str) -> str:
    return f"tiktoken alone, {processes} process{'es' if processes > 1 else ''}, {call}"


def rows(measured: dict[str, Spread]) -> list[Result]:
    """Return a result for each, with its ratios to the faster call of each bound and to each generator."""
    bounds = {}
    for processes in PROCESSES:
        calls = [measured[_bare(processes, call)].rounds for call in CALLS]
        bounds[processes] = Spread(tuple(max(both) for both in zip(*calls, strict=True)))
    return [
        Result(
            name,
            {
                "tokens_per_s": speed,
                "of_1_process_fraction": ratio(speed, bounds[1]),
                "of_2_processes_fraction": ratio(speed, bounds[2]),
                "to_midtraining_x": ratio(speed, measured[MIDTRAINING]),
                "to_sft_x": ratio(speed, measured[SFT]),
            },
        )
        for name, speed in measured.items()
    ]
