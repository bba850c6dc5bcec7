"""Tokenize one part of the data: a pure task, which gives the same file when it runs again, here or elsewhere.

Job, number of the part   ->   write_part()   ->   OUT/part-00017.words          its words
                                                   OUT/parts/part-00017.npz      the columns of its documents
                                                   OUT/parts/part-00017.json     Part, written last: it is done
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from nanopack.conversations.source import Source
from nanopack.errors import ConversationError
from nanopack.render.renderer import Renderer
from nanopack.store.folder import Folder
from nanopack.store.format import Settings, ShardFile
from nanopack.store.rendering import Bad, render_all
from nanopack.store.writer import Columns, Rendered, write_shard
from nanopack.tokenizers.tokenizer import AnyTokenizer

PARTS = "parts"
# Most parts of the data, each of which a Loader maps, and the fewest conversations in one.
MOST_PARTS = 256
LEAST_CONVERSATIONS = 512
# As in a run: this number of bad conversations in a row, or more than half of this number or more, are no few.
MOST_SKIPPED_IN_A_ROW = 100
JUDGED_AFTER = 1000


@dataclass(frozen=True)
class Part:
    """What became of the conversations of a part."""

    shard: ShardFile
    bad: tuple[Bad, ...] = ()

    def dump(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(dataclasses.asdict(self.shard) | {"bad": self.bad}).encode()

    @classmethod
    def of(cls, dumped: bytes) -> Part:
        """Return the part that was dumped."""
        found = json.loads(dumped)
        bad = tuple(Bad(*one) for one in found.pop("bad"))
        return cls(ShardFile(**found), bad)


@dataclass(frozen=True)
class Job:
    """What the parts of a store are made with. Pickles."""

    source: Source
    tokenizer: AnyTokenizer
    template: Any
    settings: Settings
    folder: Folder
    on_error: str = "raise"
    seed: int | None = None
    size: int = field(default_factory=lambda: LEAST_CONVERSATIONS)
    """Conversations of a part: `part_size` finds it once, for all that work on the job."""

    @property
    def count(self) -> int:
        """Conversations of the source, or documents with turns="each"."""
        return len(self.source)

    @property
    def parts(self) -> int:
        """The number of parts."""
        return -(-self.count // self.size)

    def conversations(self, part: int) -> range:
        """Return the indices of a part's conversations."""
        return range(part * self.size, min(self.count, (part + 1) * self.size))

    @cached_property
    def render(self) -> Renderer:
        """What renders the conversations; made in each process."""
        return Renderer(self.tokenizer, self.template, self.settings.loss, self.settings.first_assistant)

    def __reduce__(self) -> Any:
        # the renderer does not pickle
        return Job, tuple(getattr(self, one.name) for one in dataclasses.fields(self))

    def done(self, part: int) -> Part | None:
        """Return a part that was finished before, None where it was not."""
        if f"{part_name(part)}.json" not in self.folder.names(PARTS):
            return None
        return Part.of(self.folder.read(f"{PARTS}/{part_name(part)}.json"))

    def columns(self, part: int) -> Columns:
        """Return the columns of a finished part's documents."""
        with np.load(io.BytesIO(self.folder.read(f"{PARTS}/{part_name(part)}.npz"))) as file:
            return {name: file[name] for name in file.files}


def part_size(count: int) -> int:
    """Return the conversations of a part: it follows from their number alone, whatever works on them.

    >>> part_size(1000), part_size(1_000_000)
    (512, 3907)
    """
    return max(LEAST_CONVERSATIONS, -(-count // MOST_PARTS))


def part_name(part: int) -> str:
    """Return the name of a part and its files.

    >>> part_name(17)
    'part-00017'
    """
    return f"part-{part:05d}"


def write_part(job: Job, part: int, on_read: Callable[[int], object] = int) -> Part:
    """Tokenize a part and write it, whole or not at all; `on_read` is called with each number of conversations read.

    Raises ConversationError for a bad conversation, or with on_error="skip" for too many, and whatever is no fault of
    one; OSError where it cannot be written.
    """
    bad: list[Bad] = []
    name = part_name(part)
    documents = _sound(job, part, bad, on_read)
    shard, columns = write_shard(job.folder, f"{name}.words", documents, job.settings)
    buffer = io.BytesIO()
    savez: Any = np.savez
    savez(buffer, **columns)
    job.folder.write(f"{PARTS}/{name}.npz", [buffer.getbuffer()])
    done = Part(shard, tuple(bad))
    job.folder.write(f"{PARTS}/{name}.json", [done.dump()])
    return done


def _sound(job: Job, part: int, bad: list[Bad], on_read: Callable[[int], object]) -> Iterator[Rendered]:
    """Yield the documents of a part, and append its bad conversations."""
    indices = job.conversations(part)
    for read, one in enumerate(render_all(job.source, indices, job.render, job.settings, seed=job.seed), start=1):
        on_read(1)
        if not isinstance(one, Bad):
            yield one
            continue
        if job.on_error == "raise":
            raise ConversationError(f'{one.where}, {one.reason}. Fix it or pass on_error="skip".')
        bad.append(one)
        refuse_many(bad, read)


def refuse_many(bad: Sequence[Bad], read: int) -> None:
    """Raise ConversationError where the bad ones so far, in order, are more than a few of `read` conversations."""
    last, row = bad[-1], MOST_SKIPPED_IN_A_ROW
    if len(bad) >= row and last.conversation - bad[-row].conversation == row - 1:
        how = f"{row} conversations in a row are bad"
    elif read >= JUDGED_AFTER and 2 * len(bad) > read:
        how = f"{len(bad)} of {read} conversations are bad"
    else:
        return
    raise ConversationError(
        f'{last.where}, {last.reason}. {how}; on_error="skip" is for a few bad ones: repair the data'
    )
