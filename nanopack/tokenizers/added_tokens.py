"""Find a Hugging Face tokenizer's added tokens in a text, as `tokenizers` itself finds them.

    a text   ->   AddedTokens.cut()   ->   its added tokens, and where they are
                                           huggingface.py encodes what is between them

Tokens that are matched before normalization come first, the others in what is left; each time the leftmost, and of
these the longest. Ported from `AddedVocabulary::find_matches` of huggingface/tokenizers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import groupby
from typing import Any, NamedTuple

# White_Space of Unicode; str.isspace() knows four more.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
WHITE_SPACE += "\u2028\u2029\u202f\u205f\u3000"
_SPACES = re.compile(f"[{WHITE_SPACE}]*")


class Found(NamedTuple):
    """An added token in a text, with the white space that it takes."""

    id: int
    begin: int
    end: int


class AnyWord:
    """Looks for any of some words in many texts. In most there is not even the first letter of one."""

    def __init__(self, words: Iterable[str]) -> None:
        found = frozenset(word for word in words if word)
        self._first_letters = sorted({word[0] for word in found})
        self._pattern = _finder(found)

    def search(self, text: str) -> re.Match[str] | None:
        """Return the first that is in the text, of these the longest; None where there is none."""
        for letter in self._first_letters:
            if letter in text:
                return self._pattern.search(text)
        return None


class AddedTokens:
    """The added tokens of one tokenizer."""

    def __init__(self, tokens: Mapping[int, Any], as_text: Set[str] = frozenset()) -> None:
        """`tokens` are `tokenizers.AddedToken`s by id, `as_text` the contents of those that stay text."""
        self._ids = {token.content: number for number, token in tokens.items()}
        self._by_content = {token.content: token for token in tokens.values()}
        self._as_text = as_text
        self.single_words = any(token.single_word for token in tokens.values())
        passes = [[t.content for t in tokens.values() if t.content and t.normalized == late] for late in (False, True)]
        self._passes = [_finder(frozenset(contents)) for contents in passes if contents]
        self._any = AnyWord(self._ids.keys() - as_text)

    def within(self, text: str) -> bool:
        """Return whether one of the tokens that do not stay text may be in the text."""
        return self._any.search(text) is not None

    def cut(self, text: str) -> list[Found]:
        """Return the added tokens of the text, in its order."""
        found: list[Found] = []
        for pattern in self._passes:
            gaps = _between(found, len(text))
            more = [token for begin, end in gaps for token in self._find(pattern, text, begin, end)]
            found = sorted([*found, *more], key=lambda token: token.begin) if more else found
        return found

    def _find(self, pattern: re.Pattern[str], text: str, begin: int, end: int) -> Iterator[Found]:
        done = begin
        for match in pattern.finditer(text, begin, end):
            content = match[0]
            if content in self._as_text:
                continue
            first, last = match.span()
            token = self._by_content[content]
            if token.lstrip:
                while first > done and text[first - 1] in WHITE_SPACE:
                    first -= 1
                # the token before may have taken some of it, or all
                first = max(first, done)
            if token.rstrip:
                spaces = _SPACES.match(text, last, end)
                assert spaces is not None
                last = spaces.end()
            if first < last:
                yield Found(self._ids[content], first, last)
                done = last


def _between(found: list[Found], length: int) -> Iterator[tuple[int, int]]:
    """Yield from where to where there is text without any of these tokens."""
    done = 0
    for token in found:
        if done < token.begin:
            yield done, token.begin
        done = token.end
    if done < length:
        yield done, length


@functools.lru_cache(16)
def _finder(words: frozenset[str]) -> re.Pattern[str]:
    """Return `any_of` these words. A thousand take a tenth of a second to compile."""
    return any_of(words)


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    r"""Return a pattern that finds the longest of the words, written as a tree: it is tried fast.

    >>> print(any_of(["<eos>", "<end>", "<end>>"]).pattern)
    <e(?:nd>(?:>)?|os>)
    """
    return re.compile(_tree(sorted(set(words))) or r"(?!)")


def _tree(words: list[str]) -> str:
    if not words:
        return ""
    # Of sorted words the first and the last differ earliest.
    begin = words[0][: _same(words[0], words[-1])]
    rest = [word[len(begin) :] for word in words]
    branches = [_tree(list(group)) for _, group in groupby((word for word in rest if word), lambda word: word[0])]
    inner = f"(?:{'|'.join(branches)})" if branches else ""
    return re.escape(begin) + inner + ("?" if branches and "" in rest else "")


def _same(first: str, last: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
