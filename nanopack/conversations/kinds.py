"""Recognize a file that is something other than its name says."""

from __future__ import annotations

# What a file begins with that is something else than its name says.
KINDS = (
    (b"\x1f\x8b", "gzip", "name it .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "name it .zst"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with git lfs pull"),
    (b"PAR1", "Parquet", "name it .parquet"),
    (b"ARROW1", "Arrow", "name it .arrow"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"BZh", "bzip2", "unpack it"),
    (b"\xfd7zXZ", "xz", "unpack it"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
)


def refuse_other_kinds(path: str, head: bytes, own: bytes = b"never") -> None:
    """Raise ValueError where a file begins as something else than its name says, which begins with `own`."""
    if head.startswith(own):
        return
    for begins, kind, remedy in KINDS:
        if head.startswith(begins):
            raise ValueError(f"{path} is {kind}, whatever its name says; {remedy}")
    # of ASCII text in UTF-16 or UTF-32, every second byte at least
    if b"\0" in head[:4]:
        raise ValueError(f"{path} is UTF-16 or UTF-32, not UTF-8; save it as UTF-8")
