"""The commands about token stores: make one, check it, say what is in it, write it in another format.

options.py's Namespace   ->   tokenize(), store_check(), store_info(), store_export()   ->   stdout, files; an exit code
"""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace

from nanopack.cli.progress import progress
from nanopack.cli.tokenizer import find_tokenizer
from nanopack.store.check import check
from nanopack.store.export import export
from nanopack.store.format import Manifest
from nanopack.store.ray import on_ray
from nanopack.store.remote import open_folder
from nanopack.store.store import Store
from nanopack.store.tokenize import tokenize as make_store

# Options that store.tokenize takes as they are.
TAKEN = ("template", "first_assistant", "turns", "loss", "on_error", "encoder", "num_workers")


def tokenize(options: Namespace) -> int:
    """Tokenize conversations once, into a folder that `Loader` and the other commands read in place of them.

    Killed at any moment it can be run again, and does only what is missing. The bytes do not depend on the number of
    processes.
    """
    *files, out = options.files
    if not files:
        raise ValueError("tokenize takes the conversations and then a folder for the store: IN... OUT")
    given = {name: getattr(options, name) for name in TAKEN if name in options}
    tokenizer = find_tokenizer(getattr(options, "tokenizer", "chat32k"))
    if options.address and options.engine != "ray":
        raise ValueError(f"--address={options.address} has no meaning without --engine ray")
    engine = on_ray(options.address) if options.engine == "ray" else None
    with progress("tokenizing", eta=True) as show:
        make_store(files, tokenizer, out, engine=engine, show=show, **given)
    _print(Manifest.of(open_folder(out)), out, options.json)
    return 0


def store_check(options: Namespace) -> int:
    """Compare every file of a store with the hash in its manifest; exit code 1 if one differs."""
    with progress("checking", eta=True) as show:
        damaged = check(options.store, show)
    if options.json:
        print(json.dumps({"sound": not damaged, "damaged": damaged}))
    else:
        print("\n".join(damaged) or f"{options.store}: every file is as its manifest says")
    return 1 if damaged else 0


def store_info(options: Namespace) -> int:
    """Report what a store holds and how it was made."""
    _print(Store(options.store).manifest, options.store, options.json)
    return 0


def store_export(options: Namespace) -> int:
    """Write a store as Megatron-LM's .bin and .idx, llm.c's .bin, or Arrow, to OUTPUT with the format's suffixes.

    The first two have no mask: which tokens are in the loss is lost.
    """
    written = export(Store(options.store), options.output, options.to)
    print(json.dumps({"written": written}) if options.json else f"Written: {', '.join(written)}")
    return 0


def _print(manifest: Manifest, path: str, as_json: bool) -> None:
    settings = manifest.settings
    if as_json:
        plain = dataclasses.asdict(manifest)
        print(json.dumps({**plain, "fingerprint": manifest.fingerprint()}))
        return
    template = settings.template if isinstance(settings.template, str) else (settings.template or {}).get("name")
    lengths = ", ".join(f"{name} {value:,}" for name, value in manifest.lengths.items())
    skipped = f", {manifest.skipped:,} skipped" if manifest.skipped else ""
    of = "answers" if settings.turns == "each" else "conversations"
    rows = {
        "documents": f"{manifest.documents:,} of {manifest.conversations:,} {of}{skipped}",
        "tokens": f"{manifest.tokens:,}, {manifest.loss_tokens:,} of them in the loss",
        "lengths": lengths,
        "words": f"{8 * settings.word_bytes} bits, {len(manifest.shards):,} shards",
        "tokenizer": f"{settings.tokenizer_name} ({settings.tokenizer[:12]}…), {settings.vocab_size:,} ids",
        "made with": f"template={template!r}, first_assistant={settings.first_assistant!r}, turns={settings.turns!r}, "
        f"loss={settings.loss!r}",
        "sources": ", ".join(settings.names),
        "fingerprint": manifest.fingerprint(),
    }
    print(f"{path}, a token store\n")
    print("\n".join(f"{name:12}{value}" for name, value in rows.items() if value))
