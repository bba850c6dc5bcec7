"""Make a document of every answer of a conversation, as turns="each" asks for.

    Source[i], a conversation   ->   count the answers, once   ->   Answers[j]: the messages up to one answer

A chat template renders such a prefix as at inference: it leaves out the thoughts of earlier turns, and the answer's own
thoughts are in the loss. Text and tokens stay one document, and so does a conversation without an answer in the loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nanopack.conversations.announced import announced
from nanopack.conversations.fetch import fetch, random_numbers_kept, storage_error
from nanopack.conversations.records import Conversation, check, choose
from nanopack.conversations.source import Source
from nanopack.errors import NEVER_SKIPPED, StorageError, is_storage_error

_COUNTING = 'counting the answers for turns="each": %d of %d conversations are read after %.1f s'


class Answers(Source):
    """The answers of another source, each with what was said before it; documents of a conversation are neighbours.

    To number them, construction reads and checks every conversation once, in this process. On one busy core, of chats
    with 6 messages and 2 KB, a second: 120,000 from a list, 54,000 from JSONL, 36,000 from Parquet, 22,000 from a
    datasets.Dataset; so a million take 8 to 45 s. Memory: 8 bytes a conversation. Raises StorageError where one cannot
    be read; a bad conversation counts as one document, and raises when that is read.
    """

    def __init__(self, source: Source, first_assistant: str, seed: int | None) -> None:
        """Count the answers; `first_assistant` and `seed` are the loader's."""
        self._source, self._first_assistant = source, first_assistant
        self.names, self.runs_foreign_code = source.names, source.runs_foreign_code
        with random_numbers_kept(source):
            counts = np.fromiter(announced(self._counts(seed), len(source), _COUNTING), np.int64, len(source))
        # conversation i has the documents _starts[i] to _starts[i + 1]
        self._starts = np.concatenate([[0], counts]).cumsum()

    def __len__(self) -> int:
        """Return the number of documents."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Conversation:
        """Return the messages up to and including one answer, which alone is in the loss."""
        number, answer = self._find(index)
        conversation = self._chosen(self._source[number])
        answers = answers_of(conversation)
        if max(1, len(answers)) != self._count(number):
            raise StorageError(
                f"it has {len(answers)} answers in the loss now, and {self._count(number)} documents were made of it; "
                "open the conversations again"
            )
        return up_to(conversation, answers[answer]) if answers else conversation

    def where(self, index: int) -> str:
        """Return the location of the conversation and, where it has several, the answer's number: '..., answer 0'."""
        number, answer = self._find(index)
        place = self._source.where(number)
        return place if self._count(number) == 1 else f"{place}, answer {answer}"

    def source_of(self, index: int) -> int:
        return self._source.source_of(self._find(index)[0])

    def objects(self) -> tuple[object, ...]:
        return self._source.objects()

    def version(self) -> str:
        """Return the version of the other source."""
        return self._source.version()

    def picks_digest(self) -> str:
        return hashlib.sha256(self._source.picks_digest().encode() + self._starts.tobytes()).hexdigest()

    def drawn_as(self, index: int) -> int:
        return self._source.drawn_as(self._find(index)[0])

    def is_copy(self, index: int) -> bool:
        return self._find(index)[1] > 0

    def are_copies(self, indices: np.ndarray) -> np.ndarray:
        # the first document of each conversation is none
        right, left = (np.searchsorted(self._starts, indices, side) for side in ("right", "left"))
        return np.equal(right, left)

    def _find(self, index: int) -> tuple[int, int]:
        """Return the conversation of a document, and which of its documents this is."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return number, int(index - self._starts[number])

    def _count(self, number: int) -> int:
        return int(self._starts[number + 1] - self._starts[number])

    def _chosen(self, record: object) -> Conversation:
        # before it is split: with "drop" an answer before the first question is no document
        return choose(check(record), "assistant", self._first_assistant)

    def _counts(self, seed: int | None) -> Iterator[int]:
        for number in range(len(self._source)):
            try:
                yield max(1, len(answers_of(self._chosen(fetch(self._source, number, seed)))))
            except NEVER_SKIPPED:
                raise
            except Exception as error:
                if is_storage_error(error):
                    raise storage_error(error, self._source.where(number)) from error
                yield 1


def answers_of(conversation: Conversation) -> list[int]:
    """Return the indices of the assistant's messages that are in the loss."""
    if conversation.weight == 0:
        return []
    return [i for i, message in enumerate(conversation.messages) if message.role == "assistant" and message.train]


def up_to(conversation: Conversation, answer: int) -> Conversation:
    """Return the conversation up to and including message `answer`, which alone is in the loss."""
    history = (replace(message, train=False) for message in conversation.messages[:answer])
    return replace(conversation, messages=(*history, conversation.messages[answer]))
