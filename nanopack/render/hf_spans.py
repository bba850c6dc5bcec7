"""Find what is in the loss in the text that a Hugging Face chat template writes, where the template marks nothing.

    text, where its strings stand   ->   Answers.spans()   ->   (begin, end) of each answer

An answer begins where the prompt for it ends, as far as the text agrees with that prompt, and ends with the special
token that ends it. Both are looked for in the final text: a template may write an answer in another way once other
messages follow. Where the text does not say, the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NoReturn

from nanopack.errors import ConversationError
from nanopack.render.hf_outline import Leaf, Place, marks

Span = tuple[int, int]

# How a thought begins: <think>, [THINK], <|channel>thought.
_THOUGHT = re.compile(r"[^\s\]]*(?:think|thought)", re.IGNORECASE)
# Such a word or bracket by itself.
_THOUGHTS = re.compile(r"(?:[<\[]|(?<![^\s>\]]))[^\s<>\[\]]*(?:think|thought)[^\s<>\[\]]*[>\]]?", re.IGNORECASE)


class Answers:
    """Finds answers in the texts of one chat template."""

    def __init__(self, controls: Sequence[str], stops: Sequence[str], prompt: str, remedy: Callable[[], str]) -> None:
        """`controls` are the tokens that messages cannot hold, `stops` those of them that end generation.

        `prompt` is what asks for an answer after a question.
        """
        names = sorted(controls, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, names))})" if names else r"((?!))")
        self._stops = frozenset(stops)
        self._prompt = prompt
        self._remedy = remedy

    def span(
        self,
        index: int,
        text: str,
        places: Sequence[Place],
        leaves: Sequence[Leaf],
        asked: Callable[[int], str | None],
        answered: Callable[[int], str | None],
    ) -> Span:
        """Return from where to where message `index` is in the loss.

        `asked(i)` is the outline of the messages before `i` with the prompt for an answer, `answered(i)` the outline
        of those up to `i`.
        """
        first, last = self._run(index, places, leaves)
        begin_of_header = places[first - 1].end if first else 0
        header = text[begin_of_header : places[first].begin]
        prompt = _after(asked(index), places[first - 1].leaf if first else None)
        begin = begin_of_header + self._agreed(index, prompt, header)
        footer = text[places[last].end : places[last + 1].begin if last + 1 < len(places) else None]
        ending = _after(answered(index), places[last].leaf)
        if ending is None:
            self._refuse(index, "the chat template writes it in another order once others follow")
        return begin, places[last].end + self._ending(index, ending, footer)

    def _run(self, index: int, places: Sequence[Place], leaves: Sequence[Leaf]) -> tuple[int, int]:
        """Return the first and the last place of what the message says, which must follow each other."""
        own = [number for number, place in enumerate(places) if leaves[place.leaf].message == index]
        if not own:
            self._refuse(index, "the chat template writes nothing of it")
        last, seen = own[0], set[int]()
        for number in range(own[0], len(places)):
            leaf = places[number].leaf
            if leaves[leaf].message != index:
                break
            # A template may repeat the name of a call in front of its result.
            if leaf not in seen:
                last = number
            seen.add(leaf)
        if seen != {places[number].leaf for number in own}:
            self._refuse(index, "the chat template writes it among other messages")
        return own[0], last

    def lacks_its_end(self, text: str, span: Span) -> bool:
        """Return whether a special token follows the span that does not end with one."""
        said, rest = text[slice(*span)].rstrip(), text[span[1] :].lstrip()
        return not self._ends_with_control(said) and self._control.match(rest) is not None

    def _ends_with_control(self, text: str) -> bool:
        return bool(text) and not self._control.split(text)[-1]

    def _agreed(self, index: int, prompt: str | None, header: str) -> int:
        """Return how many characters of the header are those of the prompt."""
        if prompt is None:
            self._refuse(index, "the chat template writes what comes before it in another way when it is asked for")
        agreed = count_equal(prompt, header)
        # <think> and <tool_call> begin alike
        agreed = next((m.start() for m in _THOUGHTS.finditer(prompt) if m.start() < agreed < m.end()), agreed)
        controls = list(self._control.finditer(prompt))
        differs = agreed < (controls[-1].end() if controls else min(len(prompt), len(header)))
        # another role, say; but a prompt may begin a thought that the text leaves out
        asks = prompt[agreed:].strip()
        differs |= asks != "" and not _THOUGHT.match(asks)
        if differs or (self._prompt and self._prompt in header[agreed:]):
            self._refuse(index, "the chat template begins it in another way than it asks for it")
        return agreed

    def _ending(self, index: int, ending: str, footer: str) -> int:
        """Return how many characters of the footer belong to the answer, up to the token that ends it."""
        pieces, alone = self._control.split(footer), self._control.split(ending)
        common = count_equal(pieces, alone)
        # Odd pieces are special tokens.
        count = common - common % 2
        if not count and len(alone) > 1 and len(pieces) > 1 and (common or not (pieces[0] + alone[0]).strip()):
            # Another token ends it when nothing follows, as in gpt-oss.
            count = 2
        if not count and len(pieces) > 1 and pieces[1] in self._stops and not pieces[0].strip():
            count = 2
        if not count:
            self._refuse(index, "the chat template writes no special token that ends it, so the model would not stop")
        return len("".join(pieces[:count]))

    def _refuse(self, index: int, why: str) -> NoReturn:
        raise ConversationError(f"message {index}: {why}; {self._remedy()}")


def count_equal(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many items two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _after(outlined: str | None, leaf: int | None) -> str | None:
    """Return the text after the last mark of an outline, which must be this one."""
    if outlined is None:
        return None
    *_, last = (None, *marks(outlined))
    if last is None:
        return outlined if leaf is None else None
    return outlined[last[2] :] if last[0] == leaf else None
