"""Make a token store of conversations: all parts that are missing, then the columns and the manifest.

    conversations, tokenizer, OUT/   ->   tokenize()   ->   parts, by an engine   ->   OUT/, a store
                                          Plan             job.py, engines.py          writer.py: finish()

Killed at any moment it can be run again, and does only what is missing: a part is there whole or not at all, and
OUT/parts/plan.json says what the store is made of, so that parts of two kinds do not mix.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from nanopack.checks import check_choice, check_int
from nanopack.config import FIRST_ASSISTANTS, LOSSES, ON_ERROR, TURNS, Encoder
from nanopack.conversations.answers import Answers
from nanopack.conversations.data_sets import find_files
from nanopack.conversations.source import Source
from nanopack.errors import short
from nanopack.render.renderer import missing_tokens
from nanopack.state import sample_of
from nanopack.store.engines import Engine, run_here, run_in_processes
from nanopack.store.folder import TEMPORARY, Folder
from nanopack.store.format import DOCUMENTS, MANIFEST, Manifest, Settings
from nanopack.store.job import MOST_SKIPPED_IN_A_ROW, PARTS, Job, Part, part_size, refuse_many
from nanopack.store.opening import open_data, plain_template
from nanopack.store.remote import count_here, is_url, local_path, open_folder, open_remote
from nanopack.store.rendering import Bad, render_all
from nanopack.store.store import Store
from nanopack.store.writer import finish
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.splintr import choose_encoder
from nanopack.tokenizers.tokenizer import AnyTokenizer, for_template, load_tokenizer

log = logging.getLogger("nanopack")

PLAN = f"{PARTS}/plan.json"
QUARANTINE = "quarantine.jsonl"

Show = Callable[[float, str], object]
"""Takes the fraction done, 0 to 1, and a label."""


def tokenize(
    conversations: Any,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    template: Any = "nanochat",
    first_assistant: str = "keep",
    turns: str = "all",
    loss: str = "assistant",
    on_error: str = "raise",
    encoder: Encoder | None = None,
    num_workers: int | None = None,
    engine: Engine | None = None,
    show: Show = lambda fraction, label: None,
) -> Store | None:
    """Tokenize conversations into a store, and open it; what is there of it already is not made again.

    Conversations and store may be URLs of fsspec (s3://, hf://, …). A store at a URL is not opened, and None returned.

    Args:
        conversations, tokenizer, template, first_assistant, turns, loss, encoder: as of `Loader`.
        path: folder of the store. One that holds the finished store of these arguments is opened as it is.
        on_error: `"raise"` for a bad conversation, or `"skip"` it: quarantine.jsonl has its place and the reason. 100
            in a row, or more than half of 1,000 or more, stop the run either way.
        num_workers: processes; None: as many as this process may use cores; 0: none. The bytes are always the same.
        engine: what runs the parts instead, such as `nanopack.store.ray.on_ray()`.
        show: is called with the fraction done and a label.

    Raises:
        ValueError: an argument is invalid, or `path` holds something else, or parts of other data or arguments.
        ConversationError, StorageError, TemplateError: as a `Loader` does.
        OSError: the disk is full, say; nothing is under a final name that is not whole.
    """
    _check(first_assistant=first_assistant, turns=turns, loss=loss, on_error=on_error)
    check_int("num_workers", num_workers, least=0, or_none=True)
    folder = open_folder(path)
    begun = _begun(folder)
    chosen = _at(for_template(load_tokenizer(tokenizer), template), begun)
    source, files = _open(conversations, getattr(engine, "count", count_here))
    how = dict(template=plain_template(template), first_assistant=first_assistant, turns=turns, loss=loss)
    settings = settings_of(chosen, source, **how)
    if turns == "each":
        source = Answers(source, first_assistant, None)
    job = Job(
        source,
        choose_encoder(encoder, chosen, source),
        template,
        settings,
        folder,
        on_error,
        None,
        part_size(len(source)),
    )
    plan = plan_of(job, files)
    _refuse_other(folder, plan, begun)
    if MANIFEST not in folder.names():
        _refuse_lacking(job)
        with folder.alone(f"{PARTS}/lock"):
            # another run may have begun since, or finished
            _refuse_other(folder, plan, _begun(folder))
            if MANIFEST not in folder.names():
                folder.write(PLAN, [json.dumps(plan, indent=1).encode()])
                finish_parts(job, plan, _run(job, engine or _local(num_workers), show))
    _tidy(folder)
    return None if is_url(folder.path) else Store(folder.path)


def _check(**chosen: str) -> None:
    allowed = {"first_assistant": FIRST_ASSISTANTS, "turns": TURNS, "loss": LOSSES, "on_error": ON_ERROR}
    for name, value in chosen.items():
        check_choice(name, value, allowed[name])


def _open(conversations: Any, count: Callable[[Sequence[str]], list[int]]) -> tuple[Source, list[list[Any]]]:
    """Return the data, and of each of their files its path, size and time of change."""
    paths = [conversations] if isinstance(conversations, (str, os.PathLike)) else conversations
    are_paths = isinstance(paths, (list, tuple)) and all(isinstance(one, (str, os.PathLike)) for one in paths)
    if are_paths and any(map(is_url, paths)):
        if not all(map(is_url, paths)):
            raise ValueError(f"conversations={short(paths)} mixes URLs with paths; give one kind")
        return open_remote([os.fspath(path) for path in paths], count)
    source = open_data([local_path(path) for path in paths] if are_paths else conversations)
    if source.rendered:
        raise ValueError(f"{short(conversations)} is a token store already; give what it was made of")
    if not are_paths:
        return source, []
    paths = [local_path(path) for path in paths]
    found = [file for path in paths for file in find_files(path)]
    return source, [[os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in found]


def settings_of(tokenizer: AnyTokenizer, source: Source, **how: Any) -> Settings:
    """Return how documents of a source are made with this tokenizer; `how` are the other fields of Settings."""
    return Settings(
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        tokenizer=tokenizer.fingerprint(),
        tokenizer_name=tokenizer.name,
        clock=getattr(tokenizer, "clock", None) or "",
        names=source.names,
        **how,
    )


def plan_of(job: Job, files: list[list[Any]]) -> dict[str, Any]:
    """Return data and arguments of a store as JSON has them: parts of two plans do not go together."""
    plan = {
        **dataclasses.asdict(job.settings),
        "on_error": job.on_error,
        "conversations": job.count,
        "size": job.size,
        "data": sample_of(job.source, job.seed),
        "files": files,
    }
    plain: dict[str, Any] = json.loads(json.dumps(plan))
    return plain


def _begun(folder: Folder) -> dict[str, Any]:
    """Return the plan of what is in a folder already, or what a finished store keeps of it; {} where it is new."""
    names = folder.names()
    if MANIFEST in names:
        manifest = Manifest.of(folder)
        kept = {**dataclasses.asdict(manifest.settings), "conversations": manifest.conversations, "data": manifest.data}
        plain: dict[str, Any] = json.loads(json.dumps(kept))
        return plain
    if "plan.json" in folder.names(PARTS):
        found: dict[str, Any] = json.loads(folder.read(PLAN))
        return found
    if others := [name for name in names if not name.endswith(TEMPORARY)]:
        raise ValueError(f"{folder} holds other files, {others[0]} for one; give a new folder or an empty one")
    return {}


def _at(tokenizer: AnyTokenizer, begun: dict[str, Any]) -> AnyTokenizer:
    """Return the tokenizer with the date that its chat template wrote when the store was begun."""
    clock = begun.get("clock")
    return tokenizer.at(clock) if isinstance(tokenizer, HuggingFaceTokenizer) and clock else tokenizer


def _refuse_other(folder: Folder, plan: dict[str, Any], begun: dict[str, Any]) -> None:
    """Raise ValueError where the folder is of another plan, naming each difference."""
    unlike = [name for name in begun if begun[name] != plan[name] and name != "tokenizer_name"]
    plain = [f"{name} was {short(begun[name])} and is {short(plan[name])}" for name in unlike if name != "files"]
    plain += [f"{file[0]} has changed" for file in plan["files"] if "files" in unlike and file not in begun["files"]]
    if unlike:
        what = "; ".join(plain) or "the files are others"
        raise ValueError(f"{folder} was begun with other data or arguments: {what}; give a new folder, or delete it")


def _refuse_lacking(job: Job) -> None:
    """Raise TemplateError at once where the tokenizer lacks tokens of the template and the data begin with messages."""
    if missing_tokens(job.tokenizer, job.template):
        deque(render_all(job.source, range(1), job.render, job.settings, seed=job.seed))


def _local(num_workers: int | None) -> Engine:
    workers = _cores() if num_workers is None else num_workers
    return run_in_processes(workers) if workers else run_here


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(job: Job, engine: Engine, show: Show) -> list[Part]:
    """Return all parts, in order, of which those that are missing are made now."""
    done = {part: found for part in range(job.parts) if (found := job.done(part)) is not None}
    read = sum(len(job.conversations(part)) for part in done)

    def on_read(count: int) -> None:
        nonlocal read
        read += count
        show(read / job.count, f"{read:,} of {job.count:,} conversations")

    on_read(0)
    try:
        for part, found in engine(job, [part for part in range(job.parts) if part not in done], on_read):
            done[part] = found
    except BaseException:
        # of the others, which were stopped
        job.folder.sweep(PARTS)
        raise
    return [done[part] for part in range(job.parts)]


def finish_parts(job: Job, plan: dict[str, Any], parts: Sequence[Part]) -> None:
    """Write the quarantine, the columns of all documents and then the manifest; from then on it is a store."""
    bad = [one for part in parts for one in part.bad]
    if bad:
        _refuse_many(bad, job.count)
        # of an answer, the conversation that it is of, as in the columns
        numbered = (one._replace(conversation=job.source.drawn_as(one.conversation)) for one in bad)
        lines = (json.dumps(one._asdict()) + "\n" for one in numbered)
        job.folder.write(QUARANTINE, (line.encode() for line in lines))
        log.warning("%d bad conversations were skipped; %s/%s says why", len(bad), job.folder, QUARANTINE)
    columns = [job.columns(part) for part in range(job.parts)]
    shards = [part.shard for part in parts]
    finish(job.folder, shards, columns, job.settings, conversations=job.count, skipped=len(bad), data=plan["data"])


def _refuse_many(bad: Sequence[Bad], count: int) -> None:
    """Raise ConversationError where the parts together have more than a few bad conversations."""
    for end in range(1, len(bad) + 1):
        refuse_many(bad[max(0, end - MOST_SKIPPED_IN_A_ROW) : end], 0)
    refuse_many(bad, count)


def _tidy(folder: Folder) -> None:
    """Remove what a finished store does not need."""
    folder.remove_folder(PARTS)
    folder.sweep(DOCUMENTS)
