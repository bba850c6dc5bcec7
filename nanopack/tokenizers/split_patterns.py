r"""Rewrite a tokenizer's split pattern into an equivalent one that its regex engine runs faster.

    an encoding's pattern   ->   grouped()   ->   tokenizer.py, for tiktoken
                                 plain()     ->   splintr.py, for splintr-rs
    a Hugging Face pre-tokenizer   ->   of_pre_tokenizer()   ->   byte_level.py: the pattern that splits alike

tiktoken's regex engine, fancy-regex, backtracks where it must and gives the rest to an automaton. A possessive
quantifier (`++`) makes it backtrack, and alternatives that need no backtracking become one automaton each. So
`A++|B+|C|\s+(?!\S)` costs up to three automata and a stack per word, and the equivalent `(?:A+|B+|C)|\s+(?!\S)` costs
one. Only patterns whose alternatives are all known here are rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

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
# In these Hugging Face's regex engine agrees with tiktoken's; in `\s+$` it does not. Two more are Mistral's, two Qwen
# 3.5's.
_AGREED = (_POSSESSIVE_OR_NOT - {r"\s+$"}) | _AS_THEY_ARE
_AGREED |= {
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    *(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),
}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are split off first: they end a text for `\s+(?!\S)`.
_GPT2_OF_DIGITS = r"(?:'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+)|\s+(?![^\s\p{N}])|\s+"
_KANJI_KANA = "一-龥\u3040-ゟ゠-ヿ"
_DEEPSEEK = (
    r"\p{N}{1,3}",
    f"[{_KANJI_KANA}]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# The three in one. What the last leaves over, such as control characters, is a piece of its own.
_DEEPSEEK_IN_ONE = (
    r"""(?:\p{N}{1,3}|[KANA]+|[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}\p{N}KANA]?[\p{L}\p{M}--[KANA]]+| ?[\p{P}\p{S}--[KANA]]+[\r\n]*|\s*[\r\n]+)"
    r"|\s+(?![^\s\p{N}KANA])|\s+|(?:[^\s\p{L}\p{M}\p{P}\p{S}\p{N}KANA](?![\p{L}\p{M}--[KANA]]))+"
).replace("KANA", _KANJI_KANA)
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


def of_pre_tokenizer(settings: Mapping[str, Any] | None) -> str:
    """Return the pattern that splits as a byte-level pre-tokenizer of a tokenizer.json does.

    PatternError where none is known.
    """
    if settings is None:
        raise PatternError("it has no pre-tokenizer")
    steps = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise PatternError(f"its pre-tokenizer {_name(settings)} does not end with ByteLevel(add_prefix_space=False)")
    if last.get("use_regex", True):
        if not splits:
            return GPT2
        if splits == [{"type": "Digits", "individual_digits": True}]:
            return _GPT2_OF_DIGITS
        raise PatternError(f"its pre-tokenizer {_name(settings)} is not a known one")
    plainly = {"type": "Split", "pattern": None, "behavior": "Isolated", "invert": False}
    if any({**split, "pattern": None} != plainly for split in splits):
        raise PatternError(f"its pre-tokenizer {_name(settings)} is not a known one")
    patterns = tuple(str(split["pattern"].get("Regex")) for split in splits)
    if tuple(pattern.replace("\r", r"\r").replace("\n", r"\n") for pattern in patterns) == _DEEPSEEK:
        return _DEEPSEEK_IN_ONE
    if len(patterns) != 1:
        raise PatternError(f"its pre-tokenizer splits by {len(patterns)} patterns, which are not known together")
    for alternative in _ALTERNATIVE.findall(patterns[0]):
        if alternative not in _AGREED:
            raise PatternError(f"{alternative!r} of its split pattern {patterns[0]!r} is not among the known ones")
    return patterns[0]


def _name(settings: Mapping[str, Any]) -> str:
    return "+".join(step["type"] for step in settings.get("pretokenizers", [settings]))


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
