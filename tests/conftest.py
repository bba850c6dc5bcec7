"""Settings that must be in force before any test module is imported."""

import os
import sys
from pathlib import Path

# A test process per core leaves no core for the threads of an operation on a few numbers, and to wait for the last of
# them costs a time slice. torch reads this when it is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

# Triton reads this when it is imported, so this line comes before any such import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests are imported by path, so what they share has to be found another way.
sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("support", "simulator")]

# A slow machine is no failure; in CI a failure must come again. `make slow` draws ten times as many examples.
settings.register_profile("slow", max_examples=200, deadline=None, print_blob=True)
settings.register_profile("quick", settings.get_profile("slow"), max_examples=20, derandomize="CI" in os.environ)
settings.load_profile("quick")
