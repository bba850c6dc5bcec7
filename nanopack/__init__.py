"""nanopack: chat conversations in, exact packed (B, T) training batches out.

Loader makes batches; `reference.batches` makes the same ones slowly, in plain Python; `verify` compares the two.
mixture makes one data set of several, each with its share.
"""

from nanopack.batch import Batch, Flat, Piece
from nanopack.errors import ConversationError, EncoderError, ProducerError
from nanopack.explain import Explanation
from nanopack.loader import Loader
from nanopack.mixture import Mixture, mixture
from nanopack.render.templates import Template, Turn
from nanopack.state import merge_states
from nanopack.verify import verify

__all__ = [
    "Batch",
    "ConversationError",
    "EncoderError",
    "Explanation",
    "Flat",
    "Loader",
    "Mixture",
    "Piece",
    "ProducerError",
    "Template",
    "Turn",
    "merge_states",
    "mixture",
    "verify",
]
__version__ = "0.1.0"
