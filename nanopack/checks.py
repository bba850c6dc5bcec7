"""Check an argument, and refuse a wrong one with the same words everywhere: its name, its value and what to use."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_choice(name: str, value: object, allowed: Sequence[str | None], *, otherwise: str = "") -> None:
    """Raise ValueError unless the argument is one of these; `otherwise` names what else would do."""
    # by type too: 0 == False, and an array compares with every choice
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise ValueError(f"{name}={value!r} is not allowed; use one of {', '.join(map(repr, allowed))}{otherwise}")


def check_bool(name: str, value: object) -> None:
    """Raise ValueError unless the argument is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not allowed; use True or False")


def check_int(
    name: str, value: object, *, least: int, most: int | None = None, or_none: bool = False, why: str = ""
) -> None:
    """Raise ValueError unless the argument is an int within these bounds, or with `or_none` None."""
    if value is None and or_none:
        return
    # bool is an int in Python; batch_size=True is a mistake all the same
    if isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most):
        return
    upper = f" to {most}" if most is not None else " upwards"
    raise ValueError(
        f"{name}={value!r} is not allowed{why}; use an int from {least}{upper}{', or None' if or_none else ''}"
    )


def check_resident(value: object) -> None:
    """Raise ValueError unless the argument is True, False or "host"."""
    if not (isinstance(value, bool) or value == "host"):
        raise ValueError(f"resident={value!r} is not allowed; use True, False or 'host'")


def refuse_fake_tensors() -> None:
    """Raise RuntimeError within torch's FakeTensorMode, where tensors have no content to write a batch into."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise RuntimeError(
            "a loader is made, and gives its batches, outside of FakeTensorMode; take a batch before, and make fake "
            "tensors of its own with mode.from_tensor(batch.inputs)"
        )
