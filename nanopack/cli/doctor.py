"""Look at the machine as the loader will meet it, and pack one small batch: what a report of a bug needs.

versions, devices, limits, a batch per device   ->   doctor()   ->   one line a finding, "ok", "note" or "fault"
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch

from nanopack import __version__
from nanopack.data import CONVERSATIONS
from nanopack.producer.start import DEFAULT_START_METHOD
from nanopack.tokenizers.tokenizer import Tokenizer, load_tokenizer
from nanopack.verify import Verification, verify

PACKAGES = ("torch", "triton", "tiktoken", "numpy", "transformers", "trl", "accelerate", "lightning", "datasets")
"""Packages that decide what a batch is, or who takes it."""
DISTRIBUTION = "nanopack-gpu"
BATCH: dict[str, Any] = {"batch_size": 4, "seq_len": 256, "max_batches": 4}
# The ring of a loader of 32 rows of 2,048 tokens with prefetch=4, in 32-bit words; a page-locked one needs as much.
RING_BYTES = 6 * 32 * 2048 * 4
LEAST_FILES = 1024
TEXT = "naïve 😀\n\n  def f(x): return x  # 1234567"


class Finding(NamedTuple):
    """What was looked at, and what was found."""

    name: str
    state: Literal["ok", "note", "fault"]
    what: str


def doctor(options: Namespace) -> int:
    """Report versions, devices and limits, and verify a small batch on each device; exit code 1 where that fails."""
    findings = list(examine())
    if options.json:
        print(json.dumps({"findings": [finding._asdict() for finding in findings]}))
    else:
        width = max(len(finding.name) for finding in findings)
        for name, state, what in findings:
            print(f"{state:<5}  {name:<{width}}  {what}")
    return 1 if any(finding.state == "fault" for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """Yield the findings, in the order in which a reader needs them."""
    yield Finding("nanopack", "ok", f"{__version__}, in {os.path.dirname(os.path.dirname(__file__))}")
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}; {platform.platform(terse=True)}")
    yield Finding("packages", "ok", ", ".join(_versions()))
    yield _devices()
    yield from _limits()
    yield Finding("start method", "ok", f"{DEFAULT_START_METHOD}; {_cores()} cores for num_workers")
    yield _tokenizer()
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for workers in (0, 1):
            yield _batches(device, workers)


def _versions() -> Iterator[str]:
    for package in PACKAGES:
        try:
            # torch's own says of which build it is
            version = torch.__version__ if package == "torch" else importlib.metadata.version(package)
            yield f"{package} {version}"
        except importlib.metadata.PackageNotFoundError:
            continue


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return Finding("devices", "ok", f"{', '.join(names)}; {runtime}")
    # a GPU that the driver shows and torch does not is the usual fault
    if not torch.version.cuda and shutil.which("nvidia-smi"):
        return Finding("devices", "fault", "nvidia-smi is here, and torch is built for the CPU; install a CUDA build")
    why = "torch is built for the CPU" if not torch.version.cuda else "torch sees no GPU"
    return Finding("devices", "note", f"the CPU alone: {why}")


def _limits() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:
        yield Finding("limits", "note", "this system has no ulimit")
        return
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < LEAST_FILES:
        yield Finding("open files", "note", f"ulimit -n is {files}: with many files or workers, raise it")
    else:
        yield Finding("open files", "ok", f"ulimit -n is {_or_unlimited(files)}")
    enough = locked == resource.RLIM_INFINITY or locked >= RING_BYTES
    remedy = "" if enough else f": a ring of {RING_BYTES >> 20} MiB is pinned on a GPU; where that fails, raise it"
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        yield Finding(
            "shared memory", "ok" if free >= 2 * RING_BYTES else "note", f"/dev/shm has {free >> 20:,} MiB free"
        )
    yield Finding("pinned memory", "ok" if enough else "note", f"ulimit -l is {_or_unlimited(locked)} bytes{remedy}")


def _or_unlimited(limit: int) -> str:
    return "unlimited" if limit < 0 or limit >= 1 << 62 else f"{limit:,}"


def _tokenizer() -> Finding:
    tokenizer = load_tokenizer("chat32k")
    assert isinstance(tokenizer, Tokenizer)
    text = tokenizer.encoding.decode(tokenizer.encoding.encode_ordinary(TEXT))
    if text != TEXT:
        return Finding("tokenizer", "fault", f"chat32k decodes {TEXT!r} as {text!r}; install tiktoken again")
    return Finding("tokenizer", "ok", f"chat32k, {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint()}")


def _batches(device: str, workers: int) -> Finding:
    name = f"batches on {device}, num_workers={workers}"
    try:
        found = verify(CONVERSATIONS, "chat32k", device=device, num_workers=workers, **BATCH)
    except Exception as error:
        return Finding(name, "fault", f"{type(error).__name__}: {' '.join(str(error).splitlines())}")
    assert isinstance(found, Verification)
    if not found:
        return Finding(name, "fault", f"not equal to the reference packer: {found.difference}")
    return Finding(name, "ok", f"{found.batches} equal to the reference packer's in every field")
