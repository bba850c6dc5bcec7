"""Pack, verify and inspect chat conversations, measure how fast that is, and train on them.

    nanopack pack [FILES...]      pack them: speed, padding, what became of every token, the first row drawn
    nanopack verify [FILES...]    compare every batch with the slow reference packer's
    nanopack inspect [FILES...]   how long the conversations are, and the rows of a batch, drawn
    nanopack bench [FILES...]     measure nanopack, the loaders it replaces and the tokenizer alone; takes minutes
    nanopack tokenize IN... OUT   tokenize them once, into a folder that the other commands and Loader read as data
    nanopack store COMMAND OUT    check, info, export: its files, what is in it, other formats
    nanopack demo-train           train a small GPT on the conversations that ship with nanopack, in about a minute
    nanopack doctor               look at this machine, and verify a small batch on it: what a bug report needs

FILES are .jsonl, .ndjson, .json (.gz, .zst), .parquet, .arrow, or folders of these (docs/data.md says what they may
hold); the default is the conversations that ship with nanopack. Results go to stdout, as one JSON object with --json;
progress and errors go to stderr.

    nanopack pack chats.jsonl --batch-size 8 --seq-len 1024 --save batches.npz
    nanopack verify chats.jsonl --packing stream --max-batches 20
    nanopack inspect chats.jsonl --batch 3 --row 0
    nanopack inspect chats.jsonl --explain 0,17
    nanopack inspect chats.jsonl --lengths-png lengths.png --html batch.html
    nanopack bench chats.jsonl --only throughput,padding --plot bench.png

Exit code: 0; 1 if nothing was packed, verify or doctor finds a fault, or the ledger does not balance; 2 for bad input;
130 after Ctrl-C; 141 if the reader of a pipe has gone.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from nanopack.cli.commands import bench, demo_train, inspect, pack, verify
from nanopack.cli.doctor import doctor
from nanopack.cli.options import parse
from nanopack.cli.progress import warnings_on_stderr
from nanopack.cli.store import store_check, store_export, store_info, tokenize
from nanopack.cli.text import printable

STORE_COMMANDS = {"check": store_check, "info": store_info, "export": store_export}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader, such as head, has gone; the rest of the buffer must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, ImportError, OSError) as error:
        print(f"nanopack: {_one_line(error)}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    try:
        commands = pack, verify, inspect, bench, demo_train, doctor, tokenize
        options = parse(argv, __doc__ or "", *commands, of_stores=STORE_COMMANDS)
    except SystemExit as end:
        return int(end.code or 0)
    with warnings_on_stderr(verbose=getattr(options, "verbose", False)):
        code: int = options.command(options)
    return code


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'input or output'}: {error.strerror}"
    return printable(" ".join(str(error).splitlines()))
