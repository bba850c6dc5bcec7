"""What the tests of the command line share."""

from __future__ import annotations

COMMANDS = ("pack", "verify", "inspect")
SMALL = ("--batch-size", "4", "--seq-len", "64")


def refusal(result):
    """Return the one line of an exit code 2."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("nanopack: ") and err.endswith("\n") and err.count("\n") == 1
    return err


def row_of(out, name):
    return next(line.split() for line in out.splitlines() if line.startswith(name))
