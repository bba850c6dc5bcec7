"""nanopack: chat conversations in, exact packed (B, T) training batches out.

Loader makes batches; `reference.batches` makes the same ones slowly, in plain Python; `verify` compares the two.
"""

from nanopack.batch import Batch, Piece
from nanopack.conversations import ConversationError
from nanopack.explain import Explanation
from nanopack.loader import Loader
from nanopack.process import ProducerError
from nanopack.templates import Template, Turn
from nanopack.verify import verify

__all__ = [
    "Batch",
    "ConversationError",
    "Explanation",
    "Loader",
    "Piece",
    "ProducerError",
    "Template",
    "Turn",
    "verify",
]
__version__ = "0.1.0"
