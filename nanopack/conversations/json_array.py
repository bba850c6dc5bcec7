"""Find the elements of a JSON array in bytes that come in chunks, without parsing them.

    chunks of bytes   ->   scan_array()   ->   where each element begins and ends
                                               files.py reads and parses one at a time

Strings, brackets and commas are looked for with numpy, so that a file is scanned at hundreds of MB/s; memory is a chunk
and 8 bytes an element.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

# How each byte changes the depth. A comma changes nothing; it is found by its byte.
_DEPTH = np.zeros(256, np.int8)
_DEPTH[list(b"[{")] = 1
_DEPTH[list(b"]}")] = -1
_MARKS = _DEPTH != 0
_MARKS[ord(",")] = True
QUOTE, BACKSLASH, COMMA = b'"\\,'
WHITE = b" \t\r\n"


def scan_array(chunks: Iterable[bytes]) -> array[int]:
    """Return the bounds of an array's elements: element k lies between bytes bounds[k] and bounds[k + 1] - 1.

    ValueError where the array does not end, or more follows.

    >>> scan_array([b'[{"a": [1,2]}, ', b'"]"]'])
    array('q', [1, 14, 19])
    """
    bounds, size, depth, in_string, odd_backslashes, blank = array("q"), 0, 0, False, False, True
    for chunk in chunks:
        data = np.frombuffer(chunk, np.uint8)
        if bounds and depth == 0:
            _refuse_more(chunk)
        quotes, odd_backslashes = _quotes(data, odd_backslashes)
        marks = np.flatnonzero(_MARKS[data])
        # an odd number of quotes before a mark: it is inside a string
        outside = (np.searchsorted(quotes, marks) + in_string) % 2 == 0
        in_string ^= len(quotes) % 2 == 1
        marks = marks[outside]
        depths = depth + np.cumsum(_DEPTH[data[marks]], dtype=np.int64)
        end = np.flatnonzero(depths == 0)
        if len(end):
            _refuse_more(chunk[marks[end[0]] + 1 :])
        separates = (depths == 1) & (data[marks] == COMMA) | (depths == 0)
        if not bounds and len(marks):
            bounds.append(size + int(marks[0]) + 1)
        bounds.frombytes((marks[separates] + (size + 1)).astype(np.int64).tobytes())
        if blank and bounds:
            stop = bounds[1] - 1 if len(bounds) > 1 else size + len(chunk)
            blank = not chunk[max(0, bounds[0] - size) : max(0, stop - size)].strip(WHITE)
        depth = int(depths[-1]) if len(depths) else depth
        size += len(chunk)
    if depth or not bounds:
        raise ValueError("the array does not end")
    # an array of white space has no element
    return bounds[:1] if blank and len(bounds) == 2 else bounds


def _quotes(data: np.ndarray, odd_backslashes: bool) -> tuple[np.ndarray, bool]:
    """Find the quotes that no backslash escapes; return their indices, and whether the data end in odd backslashes.

    `odd_backslashes`: whether the data before ended so.
    """
    quotes = np.flatnonzero(data == QUOTE)
    slashes = np.flatnonzero(data == BACKSLASH)
    if not len(slashes) and not odd_backslashes:
        return quotes, False
    # Runs of backslashes: where each ends, and whether it is of odd length.
    last = np.flatnonzero(np.diff(slashes, append=len(data) + 1) > 1)
    lengths = np.diff(last, prepend=-1)
    ends = slashes[last] + 1
    odd = lengths % 2 == 1
    if odd_backslashes:
        if len(slashes) and slashes[0] == 0:
            odd[0] = not odd[0]
        else:
            ends, odd = np.concatenate([[0], ends]), np.concatenate([[True], odd])
    escaped = ends[odd]
    return quotes[~np.isin(quotes, escaped, assume_unique=True)], bool(odd[-1] and ends[-1] == len(data))


def _refuse_more(rest: bytes) -> None:
    if rest.strip(WHITE):
        raise ValueError(f"after the array's end comes {rest.strip(WHITE)[:20]!r}")
