"""A batch as bytes in shared memory, in the form in which it is copied to the device. numpy alone: no torch.

layout.py   how large a slot is, and where in it everything lies
slot.py     write one batch into a slot
ring.py     slots side by side, shared by two processes
"""

from nanopack.ring.layout import Layout
from nanopack.ring.ring import Ring
from nanopack.ring.slot import Slot

__all__ = ["Layout", "Ring", "Slot"]
