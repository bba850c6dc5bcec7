"""Lengths of documents in, rows out: which document goes where. Integers only: no tokens, no tensors, no GPU.

packings.py   the packings to choose from, and their options
rows.py       what a row is made of, and what every packer can do
best_fit.py   rows of whole documents;  stream.py  documents end to end;  pad.py  one document a row
simulate.py   pack lengths only, and count
"""

from nanopack.packing.packings import BestFit, BestFitCrop, BestFitPad, Packing, PackingName, Pad, Stream, as_packing
from nanopack.packing.rows import Packer, Rows, Run
from nanopack.packing.simulate import Packed, simulate

__all__ = ["BestFit", "BestFitCrop", "BestFitPad", "Packed", "Packer", "Packing", "PackingName", "Pad"]
__all__ += ["Rows", "Run", "Stream", "as_packing", "simulate"]
