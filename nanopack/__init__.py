"""nanopack: chat conversations in, exact packed (B, T) training batches out.

Loader makes batches; `reference.batches` makes the same ones slowly, in plain Python; `verify` compares the two.
`mixture` combines several data sets into one, each with a share of it. BestFit, BestFitPad, BestFitCrop, Stream and Pad
are the packings.

`nanopack.mixture` and `nanopack.verify` are functions; they shadow the modules of the same names, whose other names
are imported as usual: `from nanopack.verify import compare`.
"""

from nanopack.batch import Batch, Flat, Piece
from nanopack.distribution import refuse_other_distribution
from nanopack.errors import ConversationError, EncoderError, ProducerError, StorageError
from nanopack.explain import Explanation
from nanopack.loader import Loader
from nanopack.mixture import Mixture, mixture
from nanopack.packing.cost import ModelSizes
from nanopack.packing.packings import BestFit, BestFitCrop, BestFitPad, Pad, Stream
from nanopack.render.templates import Template, Turn
from nanopack.state import merge_states
from nanopack.verify import verify

refuse_other_distribution()

__all__ = [
    "Batch",
    "BestFit",
    "BestFitCrop",
    "BestFitPad",
    "ConversationError",
    "EncoderError",
    "Explanation",
    "Flat",
    "Loader",
    "Mixture",
    "ModelSizes",
    "Pad",
    "Piece",
    "ProducerError",
    "StorageError",
    "Stream",
    "Template",
    "Turn",
    "merge_states",
    "mixture",
    "verify",
]
__version__ = "0.1.0"
