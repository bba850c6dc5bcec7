"""Read tiktoken encodings from files: nanochat's tokenizer.pkl, and .tiktoken ranks.

    tokenizer.pkl, ranks file   ->   read_pickle(), read_ranks()   ->   tokenizer.py

A pickle is read, not executed: only the numbers and strings in it are taken.
"""

from __future__ import annotations

import base64
import io
import os
import pickle
from pathlib import Path

import tiktoken

from nanopack.errors import interrupt_in

_STATE_KEYS = {"name", "pat_str", "mergeable_ranks", "special_tokens"}


class _State:
    """Stands in for `Encoding` while its pickle is read: keeps the state, and does nothing with it."""

    state: object = None

    # without it a pickle could write into this class's own dictionary
    def __setstate__(self, state: object) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_State]:
        if (module, name) in (("tiktoken.core", "Encoding"), ("tiktoken", "Encoding")):
            return _State
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(file: Path) -> tiktoken.Encoding:
    """Return the pickled encoding of a nanochat tokenizer.pkl; ValueError if the file holds anything else."""
    data = io.BytesIO(file.read_bytes())
    try:
        found = _EncodingUnpickler(data).load()
    # A broken pickle can raise anything.
    except Exception as error:
        raise _bad_pickle(file, f"{type(error).__name__}: {first_line(error)}") from error
    if not isinstance(found, _State):
        raise _bad_pickle(file, f"it holds a {type(found).__name__}")
    state = found.state
    if isinstance(state, str):
        # Unpickled by tiktoken, this would download the encoding.
        raise _bad_pickle(file, f"it only names {state!r}, so pass tiktoken.get_encoding({state!r})")
    if not isinstance(state, dict) or set(state) != _STATE_KEYS or not isinstance(state["name"], str):
        raise _bad_pickle(file, "the Encoding in it is incomplete")
    ranks, specials = state["mergeable_ranks"], state["special_tokens"]
    return new_encoding(file, state["name"], state["pat_str"], ranks, specials)


def _bad_pickle(file: Path, why: str) -> ValueError:
    return ValueError(
        f"{file} is not a pickled tiktoken Encoding ({why}). Nothing in it was executed. "
        "Save the tokenizer again with pickle.dump(encoding, file), or pass the tiktoken.Encoding itself."
    )


def new_encoding(
    file: Path, name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]
) -> tiktoken.Encoding:
    """Return the encoding that `file` describes; ValueError if tiktoken rejects it or a byte has no rank."""
    try:
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise ValueError(
            f"{file}: tiktoken rejects its contents ({first_line(error)}). "
            "Check the split pattern, the ranks and the special tokens."
        ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{file}: byte {missing[0]:#04x} has no rank ({len(missing)} of the 256 bytes have none); "
            "give the complete ranks: without them some text cannot be encoded."
        )
    return encoding


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token of a .tiktoken file; ValueError names the faulty line."""
    if not os.path.isfile(path):
        raise ValueError(f"ranks file {str(path)!r} does not exist; give the path of a .tiktoken file.")
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        token, rank = _read_rank(f"{path}:{number}", line)
        if token in ranks or rank in lines:
            what = f"token {token!r}" if token in ranks else f"rank {rank}"
            earlier = lines[ranks.get(token, rank)]
            raise ValueError(f"{path}:{number}: {what} is in line {earlier} already; remove one of them.")
        ranks[token] = rank
        lines[rank] = number
    if not ranks:
        raise ValueError(f"{path}: there are no ranks in it; give a .tiktoken file.")
    if max(lines) >= len(lines):
        gap = next(rank for rank in range(len(lines)) if rank not in lines)
        after = min(rank for rank in lines if rank > gap)
        raise ValueError(f"{path}:{lines[after]}: rank {after}, but rank {gap} is missing; add its line.")
    return ranks


def _read_rank(place: str, line: bytes) -> tuple[bytes, int]:
    try:
        encoded, digits = line.split()
        token = base64.b64decode(encoded, validate=True)
        if token and digits.isdigit():
            return token, int(digits)
    except ValueError:
        pass
    raise ValueError(f"{place}: {line[:60]!r} is not a base64 token, a space and a rank; correct the line.")


def is_panic(error: BaseException) -> bool:
    """Whether tiktoken's Rust core panicked."""
    # Rust's panic is not an Exception, and its class cannot be imported.
    return type(error).__name__ == "PanicException"


def is_refusal(error: BaseException) -> bool:
    """Whether an encoder refuses a text by this error, rather than a signal handler what the program is doing."""
    return (isinstance(error, ValueError) or is_panic(error)) and interrupt_in(error) is None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
