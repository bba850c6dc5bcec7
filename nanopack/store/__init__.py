"""Documents that were tokenized once, on disk: written by `nanopack tokenize`, mapped into memory by a Loader.

folder.py       write files atomically, here or at a URL
format.py       the manifest: names, sizes, hashes, how the documents were made
store.py        Store, the read side
writer.py       rendered documents -> shards -> a finished store
"""

from nanopack.store.format import Manifest, Settings
from nanopack.store.store import Store, is_store
from nanopack.store.writer import Rendered, write_store

__all__ = ["Manifest", "Rendered", "Settings", "Store", "is_store", "write_store"]
