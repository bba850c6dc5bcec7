r"""Rewrite a tokenizer's split pattern into an equivalent one that its regex engine runs faster.

    an encoding's pattern   ->   grouped()   ->   tokenizer.py, for tiktoken
                                 plain()     ->   splintr.py, for splintr-rs

tiktoken's regex engine, fancy-regex, backtracks where it must and gives the rest to an automaton. A possessive
quantifier (`++`) makes it backtrack, and alternatives that need no backtracking become one automaton each. So
`A++|B+|C|\s+(?!\S)` costs up to three automata and a stack per word, and the equivalent `(?:A+|B+|C)|\s+(?!\S)` costs
one. Only patterns whose alternatives are all known here are rewritten.
"""

from __future__ import annotations

import re
from itertools import groupby

# The alternatives of known split patterns (GPT-2, cl100k, o200k, Llama 3, Qwen, nanochat) in which a plain quantifier
# matches what a possessive one does. The two differ only if giving back a match lets the rest match, which never
# happens here: what follows is disjoint from it ([^\r\n\p{L}\p{N}] before \p{L}; a space before \p{L}, \p{N} or
# [^\s\p{L}\p{N}]), may match nothing ([\r\n]*), or is absent; and \s+$ matches only a run of white space that reaches
# the end, and then all of it.
_POSSESSIVE_OR_NOT = {
    *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?\p{L}+"),
    *(r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,3}", r" ?\p{N}+"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r"\s+$", r"\s+", r"\s"),
}
# These do give back, or are never possessive: accepted unchanged or not at all.
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
    """A pattern that is not known to match the same after a rewrite."""


def plain(pattern: str) -> str:
    r"""Return the pattern without possessive quantifiers; PatternError if that might change its matches.

    >>> print(plain(r"[^\r\n\p{L}\p{N}]?+\p{L}++|\s+(?!\S)|\s"))
    [^\r\n\p{L}\p{N}]?\p{L}+|\s+(?!\S)|\s
    """
    return "|".join(_alternatives(pattern))


def grouped(pattern: str) -> str:
    r"""Return the equivalent pattern that tiktoken runs fastest; an unknown pattern unchanged.

    >>> print(grouped(r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}|\s+(?!\S)|\s"))
    (?:[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})|\s+(?!\S)|\s
    """
    try:
        alternatives = _alternatives(pattern)
    except PatternError:
        return pattern
    return "|".join(f"(?:{'|'.join(run)})" if len(run) > 1 else run[0] for run in _runs(alternatives))


def _runs(alternatives: list[str]) -> list[list[str]]:
    """Group the alternatives as automata get them: those that need backtracking separate the groups."""
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
        # The automaton's compiler factors out a common beginning, such as [^\r\n\p{L}\p{N}]? of o200k's two, and then
        # tries the second alternative where the first would have matched without that beginning.
        if len(run) > 1 and len({one[0] for one in run}) == 1:
            raise PatternError(f"{'|'.join(run)!r} of its split pattern {pattern!r} are alternatives that begin alike")
    return found
