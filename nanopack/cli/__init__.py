"""The command line: `nanopack pack`, `verify`, `inspect`, `bench`, `demo-train`. No stage depends on it."""

from nanopack.cli.main import main

__all__ = ["main"]
