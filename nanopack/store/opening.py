"""Open the data of a loader where they may be a token store, and settle its arguments with what the store says.

conversations, or the path of a store   ->   open_data()   ->   Source or Store
tokenizer, template, loss of Loader     ->   settle()      ->   those that the store was made with, checked
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from nanopack.conversations.data_sets import open_conversations
from nanopack.conversations.source import Source
from nanopack.render.templates import Template, Turn
from nanopack.store.format import Settings, is_store
from nanopack.store.store import Documents, Store
from nanopack.tokenizers.absent import NoTokenizer
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.tokenizer import AnyTokenizer, for_template, load_tokenizer

# Arguments of Loader that a store has decided, and what they are where nobody gives them.
DEFAULTS: dict[str, Any] = {
    "template": "nanochat",
    "first_assistant": "keep",
    "turns": "all",
    "loss": "assistant",
}


def open_data(conversations: Any, *, shuffled: bool = False) -> Source:
    """Return the store of a folder that `nanopack tokenize` wrote, else the conversations as `open_conversations`."""
    paths = [conversations] if isinstance(conversations, (str, os.PathLike)) else conversations
    if isinstance(paths, (list, tuple)):
        stores = [path for path in paths if isinstance(path, (str, os.PathLike)) and is_store(path)]
        if stores and len(paths) > 1:
            raise ValueError(f"conversations has {len(paths)} paths, and {stores[0]} is a token store; use a mixture")
        if stores:
            return Store(stores[0])
    return open_conversations(conversations, shuffled=shuffled)


def settle(source: Source, tokenizer: Any, arguments: dict[str, Any]) -> tuple[AnyTokenizer, dict[str, Any]]:
    """Return the tokenizer and the arguments in DEFAULTS of a loader of this source.

    Of a store, those at their defaults are the store's own. ValueError where one differs, naming both, where the
    tokenizer is another one, or where there is none and the source needs one.
    """
    if not isinstance(source, Documents):
        if tokenizer is None:
            raise ValueError("tokenizer=None is for a token store alone; give the tokenizer of these conversations")
        return for_template(load_tokenizer(tokenizer), arguments["template"]), arguments
    settings = source.settings
    own = {name: getattr(settings, name) for name in DEFAULTS} | {"template": template_of(settings.template)}
    settled = {name: _agree(source, name, value, own[name]) for name, value in arguments.items()}
    if tokenizer is None:
        # it has all that a rendered document asks of a tokenizer
        none: Any = NoTokenizer(source.vocab_size, source.bos_id, settings.tokenizer, settings.tokenizer_name)
        return none, settled
    return _same_tokenizer(source, for_template(load_tokenizer(tokenizer), settled["template"]), settings), settled


def _agree(store: Documents, name: str, given: Any, own: Any) -> Any:
    """Return the store's value of an argument, or loss="all", which needs no mask."""
    if given in (own, DEFAULTS[name]) or own is None:
        return given if own is None else own
    if name == "loss" and given == "all":
        return given
    also = ", or 'all'" if name == "loss" else ""
    raise ValueError(
        f"{name}={given!r}, and the documents of {store.path} were made with {name}={own!r}: leave it out{also}, or "
        "tokenize the conversations again"
    )


def _same_tokenizer(store: Documents, tokenizer: AnyTokenizer, settings: Settings) -> AnyTokenizer:
    if isinstance(tokenizer, HuggingFaceTokenizer) and settings.clock:
        # its digest says which date the chat template writes
        tokenizer = tokenizer.at(settings.clock)
    if settings.tokenizer and tokenizer.fingerprint() != settings.tokenizer:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} (fingerprint {tokenizer.fingerprint()[:12]}…) is not the one that made "
            f"{store.path}, {settings.tokenizer_name!r} ({settings.tokenizer[:12]}…): leave it out, or give that one"
        )
    return tokenizer


def plain_template(template: str | Template) -> Any:
    """Return a template as JSON has it: its name, or all of it as a dict."""
    return template if isinstance(template, str) else dataclasses.asdict(template)


def template_of(plain: Any) -> Any:
    """Return the template that `plain_template` made plain; None stays None."""
    if not isinstance(plain, dict):
        return plain
    turns: dict[str, Any] = {name: Turn(**value) if isinstance(value, dict) else value for name, value in plain.items()}
    return Template(**turns)
