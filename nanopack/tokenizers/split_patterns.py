r"""Write a split pattern so that it splits alike, and an encoder takes less time over it.

    an encoding's pattern   ->   grouped()   ->   tokenizers.py, for tiktoken
                                 plain()     ->   fast.py, for splintr-rs

tiktoken's regex engine, fancy-regex, backtracks where it must and hands the rest to an automaton. To it a possessive
quantifier (`++`) means that it must, and of alternatives that need no backtracking it hands over each by itself. So
`A++|B+|C|\s+(?!\S)` costs up to three automata and a stack a word, and `(?:A+|B+|C)|\s+(?!\S)`, which matches the same,
one. Only patterns made of alternatives that are known here are written anew.
"""

from __future__ import annotations

import re
from itertools import groupby

# The alternatives that split patterns are made of (GPT-2, cl100k, o200k, Llama 3, Qwen, nanochat). In these a plain
# quantifier matches what a possessive one does. The two differ only where giving back what was taken lets the rest
# match, and here it never does: what follows is disjoint from it ([^\r\n\p{L}\p{N}] before \p{L}; a space before \p{L},
# \p{N} or [^\s\p{L}\p{N}]), or may match nothing ([\r\n]*), or is not there; and \s+$ matches only a run of white space
# that reaches the end, and then all of it.
_POSSESSIVE_OR_NOT = {
    *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?\p{L}+"),
    *(r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,3}", r" ?\p{N}+"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r"\s+$", r"\s+", r"\s"),
}
# These do give back, or were never written possessively: taken as they are or not at all.
_BACKTRACKING = r"\s+(?!\S)"
_AS_THEY_ARE = {
    *(r"\s*[\r\n]", r"\s*[\r\n]+", _BACKTRACKING),
    *(r"'(?i:[sdmt]|ll|ve|re)", r"'(?:[sdmt]|ll|ve|re)", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"),
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
}
_ALTERNATIVE = re.compile(r"(?:\\.|\[(?:\\.|[^\]\\])*\]|\((?:\\.|[^()\\])*\)|[^|\\\[(])+")
_POSSESSIVE = re.compile(r"([?*+]|\{[\d,]+\})\+(?!\+)")


class PatternError(ValueError):
    """A pattern that cannot be written anew, because it is not known that it would match the same."""


def plain(pattern: str) -> str:
    r"""Return the pattern without possessive quantifiers; PatternError where that might change what it matches.

    >>> print(plain(r"[^\r\n\p{L}\p{N}]?+\p{L}++|\s+(?!\S)|\s"))
    [^\r\n\p{L}\p{N}]?\p{L}+|\s+(?!\S)|\s
    """
    return "|".join(_alternatives(pattern))


def grouped(pattern: str) -> str:
    r"""Return the pattern as tiktoken takes least time over it; as it is where it is not known.

    >>> print(grouped(r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}|\s+(?!\S)|\s"))
    (?:[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})|\s+(?!\S)|\s
    """
    try:
        alternatives = _alternatives(pattern)
    except PatternError:
        return pattern
    return "|".join(f"(?:{'|'.join(run)})" if len(run) > 1 else run[0] for run in _runs(alternatives))


def _runs(alternatives: list[str]) -> list[list[str]]:
    """Return the alternatives as the automaton gets them: those that need backtracking part the others."""
    return [list(run) for _, run in groupby(alternatives, _BACKTRACKING.__eq__)]


def _alternatives(pattern: str) -> list[str]:
    """Return the alternatives, without possessive quantifiers."""
    alternatives = _ALTERNATIVE.findall(pattern)
    found = [one if one in _AS_THEY_ARE else _POSSESSIVE.sub(r"\1", one) for one in alternatives]
    for given, one in zip(alternatives, found, strict=True):
        if given not in _AS_THEY_ARE and one not in _POSSESSIVE_OR_NOT:
            raise PatternError(f"{given!r} of its split pattern {pattern!r} is not among the known alternatives")
    if not pattern or "|".join(alternatives) != pattern:
        raise PatternError(f"its split pattern {pattern!r} cannot be taken apart")
    for run in _runs(found):
        # The automaton's compiler takes what all begin with out of them, [^\r\n\p{L}\p{N}]? of o200k's two, say, and
        # then tries the second where the first would have matched without it.
        if len(run) > 1 and len({one[0] for one in run}) == 1:
            raise PatternError(f"{'|'.join(run)!r} of its split pattern {pattern!r} are alternatives that begin alike")
    return found
