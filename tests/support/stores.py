"""Token stores for tests, and what decides how their documents are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanopack.conversations.answers import Answers
from nanopack.conversations.records import open_conversations
from nanopack.render.renderer import Renderer
from nanopack.store.format import Settings
from nanopack.store.opening import plain_template
from nanopack.store.rendering import render_all
from nanopack.store.store import Store
from nanopack.store.writer import Rendered, write_store
from nanopack.tokenizers.tokenizer import load_tokenizer


def settings_of(tokenizer: Any, names: tuple[str, ...] = (), **how: Any) -> Settings:
    made = load_tokenizer(tokenizer)
    how = {"template": "nanochat", **how}
    return Settings(
        vocab_size=made.vocab_size,
        bos_id=made.bos_id,
        tokenizer=made.fingerprint(),
        tokenizer_name=made.name,
        names=names,
        **how | {"template": plain_template(how["template"])},
    )


def store_of(path: Path, conversations: Any, tokenizer: Any, shard_documents: int = 5, **how: Any) -> Store:
    """The store of conversations, which are all sound."""
    source = open_conversations(conversations)
    settings = settings_of(tokenizer, source.names, **how)
    if settings.turns == "each":
        source = Answers(source, settings.first_assistant, None)
    render = Renderer(
        load_tokenizer(tokenizer), how.get("template", "nanochat"), settings.loss, settings.first_assistant
    )
    documents = list(render_all(source, range(len(source)), render, settings))
    assert all(isinstance(one, Rendered) for one in documents), documents
    return write_store(path, documents, settings, shard_documents=shard_documents)
