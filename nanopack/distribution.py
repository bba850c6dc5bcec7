"""See whether another distribution has installed its files into this package."""

from __future__ import annotations

from pathlib import Path


def refuse_other_distribution() -> None:
    """Raise ImportError where the distribution `nanopack` of PyPI, tools for nanopore sequencing, is here too.

    It installs `nanopack/__init__.py`, as this one does, and `version.py`: which of the two is imported depends on the
    order of installation, and uninstalling either breaks the other.
    """
    theirs = Path(__file__).with_name("version.py")
    if theirs.exists():
        raise ImportError(
            f"{theirs} is of another distribution with this import name, nanopack, tools for nanopore sequencing; "
            f"pip uninstall nanopack, then pip install --force-reinstall --no-deps nanopack-gpu"
        )
