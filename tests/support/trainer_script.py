"""Training scripts in a process of their own, for tests to interrupt or kill."""

from __future__ import annotations

import contextlib

import forked

# The matrix product and the long sum start torch's threads, as a training step does; a lambda does not pickle.
SCRIPT = """
import gc, os, signal, sys, threading, time, nanopack
import torch
torch.randn(300, 300) @ torch.randn(300, 300)
torch.ones(1_000_000).add_(1)
CHATS = [{"text": f"a b c d e f g {i}"} for i in range(40)]
class Data(list):
    def __init__(self, do=lambda: None, at=None):
        super().__init__(CHATS)
        self.do, self.at = do, at
    def __getitem__(self, i):
        if i == self.at:
            self.do()
        return super().__getitem__(i)
def make(*data):
    loader = nanopack.Loader(Data(*data), "chat32k", batch_size=1, seq_len=8, packing="stream", loss="all")
    print(loader.producer_pid, flush=True)
    return loader
"""


@contextlib.contextmanager
def script(tmp_path, text, **modules):
    """Run SCRIPT and then `text`, next to files of these names; give the process, and kill it at the end."""
    for name, content in modules.items():
        (tmp_path / f"{name}.py").write_text(content)
    path = tmp_path / "flat.py"
    path.write_text(SCRIPT + text)
    process = forked.start(path, PYTHONWARNINGS="default")
    try:
        yield process
    finally:
        process.kill_group()
        process.wait(60)
