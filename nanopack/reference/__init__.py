"""The definition: the same batches as the loader's, slowly, in plain Python. Shares no code with the fast path.

`batches` is the function; the four files are batches.py, documents.py, order.py and packing.py.
"""

from nanopack.reference.batches import batches

__all__ = ["batches"]
