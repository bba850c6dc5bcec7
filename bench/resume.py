"""Does going on take longer the later a run was interrupted?  python bench/resume.py

A stream of documents that are rendered already is packed to step 100 and to step 100,000, and the state saved at each.
Told is the time from load_state_dict() to the first batch, in turns, medians, and the ratio of the two: a loader that
replays what it has read would show a ratio of a thousand.
"""

from __future__ import annotations

import json
import platform
import statistics
import time

import numpy as np
import torch

from nanopack import Loader

STEPS, TURNS = (100, 100_000), 15


class Documents:
    """A million documents of lognormal length, ids and mask made when they are asked for."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.lengths = np.clip(rng.lognormal(5.9, 1.0, 1_000_000), 8, 20_000).astype(int)
        self.ids = rng.integers(0, 32_000, 20_000, dtype=np.uint16)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.ids[: self.lengths[index]]}


def main() -> None:
    """Measure, print a table, and the same numbers as JSON on the last line."""
    documents, states = Documents(), {}
    arguments = dict(batch_size=4, seq_len=256, packing="best_fit", num_workers=0)
    with Loader(documents, "chat32k", **arguments) as loader:
        for step in range(max(STEPS) + 1):
            if step in STEPS:
                states[step] = json.loads(json.dumps(loader.state_dict()))
            next(loader)
    times: dict[int, list[float]] = {step: [] for step in STEPS}
    with Loader(documents, "chat32k", **arguments) as loader:
        for _ in range(TURNS):
            for step in STEPS:
                began = time.perf_counter()
                loader.load_state_dict(states[step])
                next(loader)
                times[step].append((time.perf_counter() - began) * 1e3)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    medians = {step: statistics.median(values) for step, values in times.items()}
    for step, median in medians.items():
        size = len(json.dumps(states[step]))
        print(f"step {step:>7,}: first batch {median:.1f} ms after load_state_dict, state of {size:,} bytes")
    ratio = medians[STEPS[1]] / medians[STEPS[0]]
    print(f"ratio {ratio:.2f}")
    print(json.dumps({"ms": medians, "ratio": ratio}))


if __name__ == "__main__":
    main()
