"""Let a reader keep what it renders, as the loader's `cache` asks for, or read what was kept before.

Reader, the folder of the cache   ->   cached()   ->   a Reader of the same documents
"""

from __future__ import annotations

import logging
import os

from nanopack.producer.reader import Reader
from nanopack.producer.stored import reader_of
from nanopack.store.cache import Cache, CachedStore
from nanopack.store.opening import plain_template
from nanopack.store.tokenize import settings_of
from nanopack.tokenizers.tokenizer import AnyTokenizer

log = logging.getLogger("nanopack")


def cached(reader: Reader, folder: str | os.PathLike[str], data: str, tokenizer: AnyTokenizer) -> Reader:
    """Return a reader that reads the cached documents, where they are all there, else one that caches what it reads.

    `data` is the digest of the source, `tokenizer` the one that was given, without an encoder of its own. ValueError
    where the source is a token store already.
    """
    source, config = reader.source, reader.config
    if isinstance(source, CachedStore):
        return reader
    if source.rendered:
        raise ValueError(f"cache={os.fspath(folder)!r} has no meaning with a token store, which is read as it is")
    settings = settings_of(
        tokenizer,
        source,
        template=plain_template(config.template),
        first_assistant=config.first_assistant,
        turns=config.turns,
        # the bits are the same for "all", where reading sets them
        loss="last" if config.loss == "last" else "assistant",
    )
    cache = Cache(folder, source, settings, data)
    if reader.cache is None:
        found = cache.stored() is not None or cache.finish_before()
        what = "the documents are read from %s" if found else "no documents of these data yet; they are written to %s"
        log.info("cache: " + what, cache.path)
    stored = cache.stored()
    if stored is not None:
        return reader_of(stored, reader.tokenizer, config)
    return Reader(source, reader.tokenizer, config, cache) if reader.cache is None else reader
