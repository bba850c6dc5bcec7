"""A batch as bytes in shared memory, in the form in which it is copied to the device. numpy alone: no torch.

layout.py   the format: how large a slot is, and where everything is in it
places.py   where its pieces land
slot.py     write one batch into a slot
table.py    or only its table, where the words are on the device
facts.py    what the host knows of that batch
ring.py     the slots in shared memory, and the status of the producer
"""

from nanopack.ring.facts import BatchFacts
from nanopack.ring.layout import Layout
from nanopack.ring.ring import ProducerStatus, Ring
from nanopack.ring.slot import Slot

__all__ = ["BatchFacts", "Layout", "ProducerStatus", "Ring", "Slot"]
