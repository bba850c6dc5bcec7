"""Read the tables of a byte-level BPE from a tokenizer.json: what tiktoken needs to have the same ids.

    tokenizer.json, vocabulary   ->   parse(), normal_form(), bytes_of(), rank_tokens()   ->   byte_level.py

What is written in another way than bytes, or merged in another order than tiktoken's, is NotByteLevel, and says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np

NormalForm: TypeAlias = Literal["NFC", "NFD", "NFKC", "NFKD"]
# How a byte is written in a vocabulary: as itself where it prints, else as one of the characters from 256 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {point: point for point in _PRINTED}
_BYTE_OF |= {0x100 + number: byte for number, byte in enumerate(sorted(set(range(256)) - set(_PRINTED)))}
# Neither is in a vocabulary that is written in bytes.
_SEPARATOR, _QUOTE = "\ue000", "\ue001"
# Characters below 256 that stand for no byte become one that is none either.
_TO_BYTES = {**dict.fromkeys(range(256), "\ue002"), **{point: chr(byte) for point, byte in _BYTE_OF.items()}}
_TO_BYTES[0x20] = _SEPARATOR
FROM_BYTE = {byte: chr(point) for point, byte in _BYTE_OF.items()}
_MERGE = re.compile(r'"([^"]*)","([^"]*)"')


class NotByteLevel(ValueError):
    """Why a tokenizer cannot be encoded this way."""


def parse(settings: str) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return all but the model, the model without its tables, and what each merge makes, in their order.

    The tables are most of it, and cut out: to parse them as JSON takes a second.
    """
    begin = settings.rindex('"model":{"type":')
    model = settings[begin + len('"model":') :]
    if not model.startswith('{"type":"BPE"'):
        raise NotByteLevel(f"its model is {model[9 : model.index(',') - 1]}, not BPE")
    head: dict[str, Any] = json.loads(settings[:begin] + '"model":null}')
    options: dict[str, Any] = json.loads(model[: model.index('"vocab":{')] + '"vocab":null}')
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if options.get(name):
            raise NotByteLevel(f"its {name} is {options[name]!r}")
    merges = model[model.rindex('"merges":[') + len('"merges":[') : model.rindex("]")]
    # Escapes go first, so that each quote left is one around a token.
    plain = merges.replace(r"\\", _SEPARATOR).replace(r"\"", _QUOTE)
    made = "\n".join(map("".join, _MERGE.findall(plain)))
    return head, options, made.replace(_SEPARATOR, "\\").replace(_QUOTE, '"').split("\n") if made else []


def normal_form(normalizer: Any) -> NormalForm | None:
    """Return the Unicode form that a normalizer writes; None where it does nothing, NotByteLevel for any other."""
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if not steps:
        return None
    if len(steps) > 1 or steps[0]["type"] not in get_args(NormalForm):
        raise NotByteLevel(f"its normalizer is {'+'.join(step['type'] for step in steps)}")
    return cast(NormalForm, steps[0]["type"])


def trims_offsets(post: Any) -> bool:
    """Whether a post-processor leaves blanks out of the tokens' offsets."""
    steps = post.get("processors", [post]) if post else []
    return any(step.get("trim_offsets", False) for step in steps)


def bytes_of(vocab: Mapping[str, int]) -> dict[bytes, int]:
    """Return the ids by the tokens' bytes, without tokens that are not written in bytes."""
    written = " ".join(vocab).translate(_TO_BYTES).split(_SEPARATOR)
    if len(written) != len(vocab):
        written = [token.translate(_TO_BYTES) for token in vocab]
    found: dict[bytes, int] = {}
    for token, number in zip(written, vocab.values(), strict=True):
        try:
            found[token.encode("latin-1")] = number
        except UnicodeEncodeError:
            continue
    return found


def rank_tokens(
    tokens: dict[bytes, int], products: list[str], ignores_merges: bool
) -> tuple[dict[bytes, int], np.ndarray | None]:
    """Return the rank of each token, and the id of each rank; None where ranks are ids."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in tokens]:
        raise NotByteLevel(f"its vocabulary lacks byte {missing[0]:#04x}")
    # Several merges may make one token, but one after the other.
    written = [product for product, _ in groupby(products)]
    made = dict.fromkeys(bytes_of({product: 0 for product in written}))
    if len(made) != len(written):
        raise NotByteLevel("its merges make a token in two places, or one that is not written in bytes")
    others = [token for token in tokens if len(token) > 1 and token not in made] if ignores_merges else []
    order = [*(bytes([byte]) for byte in range(256)), *made, *others]
    ids = np.fromiter((tokens[token] for token in order), np.uint32, len(order))
    if not others and (ids[257:] > ids[256:-1]).all():
        return dict(zip(order, ids.tolist(), strict=True)), None
    return dict(zip(order, range(len(order)), strict=True)), ids
