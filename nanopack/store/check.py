"""Compare every file of a store with the hash in its manifest.

OUT/   ->   check()   ->   the files that are damaged, by name: what was expected, what was found
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from nanopack.store.format import Manifest

READ_BYTES = 1 << 22


def check(
    path: str | os.PathLike[str], show: Callable[[float, str], object] = lambda fraction, label: None
) -> list[str]:
    """Return a line for each file that is missing, has another size or other bytes; none where all is well.

    `show` is called with the fraction done and a label. ValueError where it is no store.
    """
    path = os.fspath(path)
    manifest = Manifest.read(path)
    found, read, total = [], 0, max(1, sum(one.bytes for one in manifest.files))
    for one in manifest.files:
        file = os.path.join(path, one.name)
        size = os.path.getsize(file) if os.path.isfile(file) else None
        if size != one.bytes:
            found.append(f"{file}: expected {one.bytes:,} bytes, found {'no file' if size is None else f'{size:,}'}")
        elif (digest := _sha256(file)) != one.sha256:
            found.append(f"{file}: expected SHA-256 {one.sha256[:12]}…, found {digest[:12]}…")
        read += one.bytes
        show(read / total, one.name)
    return found


def _sha256(file: str) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
