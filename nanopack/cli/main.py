"""Pack, verify and look at chat conversations from the command line, measure how fast that is, and train on them.

    nanopack pack [FILES...]      pack them: speed, padding, what became of every token, the first row drawn
    nanopack verify [FILES...]    hold every batch against the slow reference packer's
    nanopack inspect [FILES...]   how long the conversations are, and what lies where in a batch, drawn
    nanopack bench [FILES...]     how fast, beside the loaders it replaces and the tokenizer alone; minutes
    nanopack demo-train           train a small GPT on the conversations that ship with nanopack, in about a minute

FILES are .jsonl, .jsonl.gz or .parquet; without any, the conversations that ship with nanopack are taken.
Results go to stdout, or as one JSON object with --json; progress and errors go to stderr.

    nanopack pack chats.jsonl --batch-size 8 --seq-len 1024 --save batches.npz
    nanopack verify chats.jsonl --packing stream --max-batches 20
    nanopack inspect chats.jsonl --batch 3 --row 0
    nanopack inspect chats.jsonl --explain 0,17
    nanopack bench chats.jsonl --only a,c --plot bench.png
    nanopack inspect chats.jsonl --png batch.png --lengths-png lengths.png --html batch.html

Exit code: 0; 1 where verify finds a difference or the ledger does not balance; 2 for bad input; 130 after Ctrl-C.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence

from nanopack.cli.commands import bench, demo_train, inspect, pack, verify
from nanopack.cli.options import CONFIG_DEFAULTS, TOKENIZERS, parse
from nanopack.cli.progress import warnings_on_stderr
from nanopack.errors import ConversationError

NAMES = "|".join([*CONFIG_DEFAULTS, "tokenizer", "encoder", "executor"])
# In an error: what is quoted, or else an argument's name before a value. A path may hold rank=0/ too, quoted or not.
ARGUMENT = re.compile(rf"""(?<!\w)(['"])(?:\\.|(?!\1).)*\1|(?<![^\s(])({NAMES})=(?=['"(\[]|[-\w]+(?:[\s,;:)]|$))""")


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
        # Whoever read, such as head, has seen enough; what is left in the buffer must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, ImportError, OSError) as error:
        print(f"nanopack: {_in_flags(error)}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    try:
        options = parse(argv, __doc__ or "", pack, verify, inspect, bench, demo_train)
    except SystemExit as end:
        return int(end.code or 0)
    with warnings_on_stderr():
        code: int = options.command(options)
    return code


def _in_flags(error: Exception) -> str:
    """Return the error on one line, with Python's arguments in it as flags: seq_len=0 becomes --seq-len=0."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'input or output'}: {error.strerror}"
    message = " ".join(str(error).splitlines())
    if isinstance(error, ConversationError):
        # The rest may be the words of a file.
        return re.sub(r'pass on_error="skip"\.$', "pass --on-error skip.", message)
    if message.startswith("tokenizer="):
        # of what a loader takes, a command line can only name some
        message = f"{message.rpartition('; ')[0]}; give {TOKENIZERS}; any other goes in from Python"
    message = ARGUMENT.sub(lambda found: f"--{found[2].replace('_', '-')}=" if found[2] else found[0], message)
    return re.sub(", or None$", ", or leave it out", message.removeprefix("conversations="))
