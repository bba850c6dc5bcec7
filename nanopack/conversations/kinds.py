"""Recognize a file that is something other than its name says.

path, first bytes   ->   refuse_other_kinds()   ->   ValueError: what it is, and what to do
                         files.py, parquet.py and arrow.py ask
"""

from __future__ import annotations

import re

_UNPACK = "unpack it"
_CONVERT = "convert it to .jsonl or .parquet"
# What a file begins with, as a pattern, what it is then, and what to do.
KINDS = (
    (rb"\x1f\x8b", "gzip", "name it .gz"),
    (rb"\x28\xb5\x2f\xfd", "zstd", "name it .zst"),
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with git lfs pull"),
    (rb"PAR1", "Parquet", "name it .parquet"),
    (rb"ARROW1|\xff{4}", "Arrow", "name it .arrow"),
    (rb"PK\x03\x04", "a zip archive", _UNPACK),
    (rb".{257}ustar(\0|  \0)", "a tar archive", _UNPACK),
    (rb"BZh", "bzip2", _UNPACK),
    (rb"\xfd7zXZ", "xz", _UNPACK),
    (rb"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (rb"\x04\x22\x4d\x18", "lz4", _UNPACK),
    (rb"ORC", "ORC", _CONVERT),
    (rb"Obj\x01", "Avro", _CONVERT),
    (rb"\x93NUMPY", "an array of numpy", _CONVERT),
    (rb"\x80[\x02-\x05]", "a pickle", _CONVERT),
    (rb"\x89HDF", "HDF5", _CONVERT),
    (rb"SQLite format 3", "a database of SQLite", _CONVERT),
    (rb".{5}\0{3}\{", "safetensors", _CONVERT),
    (rb"\s*<", "HTML or XML", "a server may have sent it in place of the file: download that again"),
    (rb"\xff\xfe|\xfe\xff|\0{0,3}[\s{\[]\0|\0{1,3}[\s{\[]", "UTF-16 or UTF-32", "save it as UTF-8"),
    (rb".{0,7}\0", "binary", _CONVERT),
)
_JSON = (rb"(\xef\xbb\xbf)?\s*[{\[]", "JSON", "name it .json, or .jsonl")


def refuse_other_kinds(path: str, head: bytes, own: tuple[bytes, ...] = ()) -> None:
    """Raise ValueError where a file begins as something else than its name says: one of `own`, or text of JSON."""
    if head.startswith(own):
        return
    zeros = len(head) - len(head.lstrip(b"\0"))
    # UTF-32 begins with 3 at most
    if zeros > 3:
        raise ValueError(
            f"{path} begins with zero bytes ({zeros:,} at least), as a file does that was not written to the end when "
            "the machine crashed; make or copy it again"
        )
    for begins, kind, remedy in (*KINDS, _JSON) if own else KINDS:
        if re.match(begins, head, re.DOTALL):
            raise ValueError(f"{path} is {kind}, whatever its name says; {remedy}")
