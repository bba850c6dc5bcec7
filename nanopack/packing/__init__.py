"""Lengths of documents in, rows out: which document goes where. Integers only: no tokens, no tensors, no GPU.

rows.py       what a row is made of, and what every packing can do
stream.py     documents end to end        best_fit.py   rows of whole documents
packers.py    the packings by name
"""

from nanopack.packing.best_fit import BestFit
from nanopack.packing.packers import MAX_AGE, PACKINGS, WINDOWS, OneEach, make_packer
from nanopack.packing.rows import Packer, Row, Run
from nanopack.packing.stream import Stream

__all__ = ["MAX_AGE", "PACKINGS", "WINDOWS", "BestFit", "OneEach", "Packer", "Row", "Run", "Stream", "make_packer"]
