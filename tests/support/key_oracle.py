"""What a record means, written apart from the product: the key table as plain ifs, and records of random shapes.

`meaning(record)` gives (messages, text, tokens, weight, tools, kwargs), or REFUSED. A message is (role, text or parts,
what else it holds, in the loss).
"""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

REFUSED = "refused"
ROLES = ("user", "assistant")


class Refuse(Exception):
    """The record is refused."""


def meaning(record: Any) -> Any:
    try:
        return _meaning(record)
    except Refuse:
        return REFUSED


def nothing(value: Any) -> bool:
    return value in (None, "", [], (), {}) or (isinstance(value, str) and value.strip() in ("[]", "{}", "null", '""'))


def _meaning(record: Any) -> Any:
    if isinstance(record, list):
        return [message(m) for m in said(record)], None, None, 1.0, None, None
    if not isinstance(record, dict):
        raise Refuse
    has = {key for key, value in record.items() if value is not None}
    shape = has & {"messages", "conversations", "text", "input_ids"}
    for one, two in (("prompt", "completion"), ("instruction", "output")):
        if one in has and two in has:
            shape |= {one}
    if len(shape) != 1:
        raise Refuse
    [kind] = shape
    weight = 1.0 if record.get("weight") is None else record["weight"]
    if isinstance(weight, (bool, str)) or not 0 <= weight < 3.5e38:
        raise Refuse
    for key in ("images", "audio", "functions", "train", "sample_weight", "reasoning"):
        if not nothing(record.get(key)):
            raise Refuse
    # other spellings, and unknown names that speak of the loss or of pictures
    for key in ("Labels", "systemPrompt", "Tools", "image_path"):
        if not nothing(record.get(key)) and record[key] is not False:
            raise Refuse
    if record.get("trainTurn") in (0, 1, "true", [0, 1]) or record.get("label") is False:
        raise Refuse
    if kind in ("prompt", "instruction") and not nothing(record.get("context")):
        raise Refuse
    if kind == "prompt" and not (nothing(record.get("input")) and nothing(record.get("history"))):
        raise Refuse
    if kind in ("messages", "conversations") and not nothing(record.get("history")):
        raise Refuse
    if kind in ("text", "input_ids") and record.get("role") in NAMES:
        raise Refuse
    if record.get("mask") and (kind in ("text", "input_ids") or record["mask"] not in ("User", "user", "human")):
        raise Refuse
    about_tokens = {"labels", "loss_mask", "assistant_masks", "completion_mask", "attention_mask", "position_ids"}
    about_messages = [k for k in ("system", "tools", "chat_template_kwargs") if not nothing(record.get(k))]
    if (kind != "input_ids" and has & about_tokens) or (kind in ("text", "input_ids") and about_messages):
        raise Refuse
    if kind == "text":
        if not isinstance(record["text"], str):
            raise Refuse
        return [], record["text"], None, float(weight), None, None
    if kind == "input_ids":
        return [], None, tokens(record), float(weight), None, None
    if kind == "prompt":
        ask, answer = record["prompt"], record["completion"]
        asked = [("user", ask, {}, False)] if isinstance(ask, str) else [(*message(m)[:3], False) for m in said(ask)]
        answered = [("assistant", answer, {}, True)] if isinstance(answer, str) else [message(m) for m in said(answer)]
        messages = asked + answered
    elif kind == "instruction":
        if not all(isinstance(record.get(key) or "", str) for key in ("instruction", "input", "output")):
            raise Refuse
        lines = [record.get(key) for key in ("instruction", "input") if record.get(key)]
        before = [
            (role, text, {}, True)
            for pair in record.get("history") or []
            for role, text in zip(ROLES, pair, strict=True)
        ]
        messages = [*before, ("user", "\n".join(lines), {}, True), ("assistant", record["output"], {}, True)]
    else:
        messages = [message(m) for m in said(record[kind])]
    if not nothing(record.get("system")):
        if messages[0][0] in ("system", "developer") or not isinstance(record["system"], str):
            raise Refuse
        messages = [("system", record["system"], {}, True), *messages]
    tools = None if nothing(record.get("tools")) else listed(record["tools"])
    kwargs = None if nothing(record.get("chat_template_kwargs")) else parsed(record["chat_template_kwargs"])
    if not isinstance(kwargs, dict | None):
        raise Refuse
    return messages, None, None, float(weight), tools, kwargs


def said(messages: Any) -> list[Any]:
    if not isinstance(messages, list) or not messages:
        raise Refuse
    return messages


def parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise Refuse from None


def listed(value: Any) -> list[dict[str, Any]]:
    items = parsed(value)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Refuse
    return items


NAMES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
WRITTEN = ("tool_calls", "function_call", "reasoning_content", "thinking", "refusal")


def message(one: Any) -> tuple[str, Any, dict[str, Any], bool]:
    if not isinstance(one, dict):
        raise Refuse
    has = {key: value for key, value in one.items() if value is not None}
    if {"role", "from"} <= has.keys() or {"content", "value"} <= has.keys():
        raise Refuse
    role = has.get("role", has.get("from"))
    role = NAMES.get(role.lower()) if isinstance(role, str) else None
    if role is None:
        raise Refuse
    loss = set()
    for key in ("weight", "train", "loss", "masked"):
        if key in has and not nothing(has[key]):
            if has[key] not in (0, 1):
                raise Refuse
            if key in ("train", "loss") and has[key] and role != "assistant":
                raise Refuse
            loss.add(bool(has[key]) != (key == "masked"))
    if len(loss) > 1 or not nothing(has.get("loss_mask")):
        raise Refuse
    if not nothing(has.get("toolCalls")) or not nothing(has.get("parts")):
        raise Refuse
    if has.get("no_loss") in (True, False, "yes") and has["no_loss"] is not None:
        raise Refuse
    known = ("role", "from", "content", "value", "weight", "train", "loss", "masked", "loss_mask")
    rest = {key: value for key, value in has.items() if key not in known and not nothing(value)}
    if "tool_calls" in rest:
        rest["tool_calls"] = listed(rest["tool_calls"])
    content = has.get("content", has.get("value"))
    if content is None and any(key in rest for key in WRITTEN):
        content = ""
    return role, content if isinstance(content, str) else parts(content), rest, loss != {False}


def parts(content: Any) -> list[tuple[str, str]]:
    if not isinstance(content, list):
        raise Refuse
    found = []
    for part in content:
        kinds = {"text": "text", "input_text": "text", "python": "python", "python_output": "python_output"}
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise Refuse
        if not nothing(part.get("image_url")) or part.get("no_loss") in (True, False):
            raise Refuse
        found.append((kinds[part["type"]], part["text"]))
    return found


def tokens(record: dict[str, Any]) -> list[tuple[int, bool]]:
    ids = record["input_ids"]
    keep = record.get("attention_mask") or [1] * len(ids)
    masks = [record[key] for key in ("loss_mask", "assistant_masks", "completion_mask") if record.get(key) is not None]
    if (labels := record.get("labels")) is not None:
        if len(labels) != len(ids) or any(label not in (-100, id) for label, id in zip(labels, ids, strict=True)):
            raise Refuse
        masks.append([int(label != -100) for label in labels])
    if any(len(mask) != len(ids) or set(mask) - {0, 1} for mask in [*masks, keep]):
        raise Refuse
    kept = [place for place, bit in enumerate(keep) if bit]
    positions = record.get("position_ids") or list(range(len(ids)))
    if not kept or len(positions) != len(ids):
        raise Refuse
    positions = [positions[place] for place in kept] if record.get("position_ids") else []
    if any(b - a != 1 for a, b in itertools.pairwise(positions)):
        raise Refuse
    if any(len({mask[place] for mask in masks}) > 1 for place in kept):
        raise Refuse
    return [(ids[place], bool(masks[0][place]) if masks else True) for place in kept]


# Records of random shapes, most of them nearly right.

SAID = ["", "Q", "It is 5.", "two\nlines", "é🙂", "<|im_end|>", "[]", " x "]
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"city": "Bonn", "n": None}}}]


def draw_message(draw: random.Random) -> Any:
    role, content = draw.choice([("role", "content")] * 6 + [("from", "value")] * 3 + [("role", "value")])
    names = ["user", "assistant"] * 6 + [*NAMES, "User", "GPT", "judge", None, 3]
    found: dict[str, Any] = {role: draw.choice(names), content: draw.choice([*SAID, *SAID, None])}
    if draw.random() < 0.2:
        found[content] = [draw_part(draw) for _ in range(draw.randrange(3))]
    extras = {
        "weight": [0, 1, 0.0, 1.0, True, 0.5, None],
        "train": [True, False, None, "no"],
        "masked": [True, False],
        "loss": [True, False, ""],
        "loss_mask": [None, [0, 1]],
        "tool_calls": [CALLS, [], None, json.dumps(CALLS), "[]", "no", {}],
        "reasoning_content": ["R", "", None],
        "function_call": [None, {"name": "f", "arguments": "{}"}],
        "refusal": [None, "No."],
        "name": ["add", None],
        "id": ["m1", 7],
        "mood": ["good", None, ""],
        "toolCalls": [CALLS, [], None],
        "parts": [[{"text": "x"}], [], None],
        "no_loss": [True, False, None, "yes", "maybe", 0.5, 3],
        "content": [None, "again"],
        "from": [None, "gpt"],
    }
    for key in draw.sample(list(extras), draw.choice([0, 0, 0, 0, 1, 1, 2])):
        found[key] = draw.choice(extras[key])
    if found[content] is None and draw.random() < 0.5:
        key = draw.choice(["tool_calls", "reasoning_content", "function_call", "refusal", "name"])
        found[key] = draw.choice(extras[key])
    return found if draw.random() < 0.98 else draw.choice([None, "Q", [], {}])


def draw_part(draw: random.Random) -> Any:
    found = {"type": draw.choice(["text"] * 4 + ["input_text", "python", "image", None]), "text": draw.choice(SAID)}
    if draw.random() < 0.2:
        found |= draw.choice(
            [{"image_url": "x"}, {"cache_control": {"type": "a"}}, {"mood": 1}, {"text": None}, {"no_loss": True}]
        )
    return found


def draw_messages(draw: random.Random) -> Any:
    return [draw_message(draw) for _ in range(draw.choice([1, 2, 2, 3, 4]))] if draw.random() < 0.97 else []


def draw_record(draw: random.Random) -> Any:
    """Return a record: of one shape, with further keys, and now and then of two shapes or none."""
    record: dict[str, Any] = {}
    for _ in range(draw.choice([1] * 15 + [0, 2])):
        record |= draw_shape(draw)
    extras: dict[str, list[Any]] = {
        "weight": [1, 0.5, 0, -1, True, "1", None],
        "system": ["Be curt.", "", None, 5],
        "tools": ["[]", [], None, CALLS, json.dumps(CALLS), "no", [3]],
        "chat_template_kwargs": [{}, {"a": 1}, '{"a": 1}', "[1]", None],
        "images": [[], ["x"]],
        "mask": ["User", [0, 1], None, "gpt"],
        "labels": [None, [1, 2]],
        "sample_weight": [None, 1.0],
        "id": [1, "a"],
        "score": [0.5],
        "mood": ["good"],
        "prompt": ["Q"],
        "label": [True, False, None, 3, "spam"],
        "reasoning": ["R", "", None],
        "context": ["C", "", None],
        "history": [[["H", "B"]], []],
        "role": ["user", "prompter", "judge", None],
        "trainTurn": [0, 1, "true", "no idea", [0, 1], 7, None],
        "systemPrompt": ["S", "", None],
        "Labels": [[1], [], None],
        "Tools": [CALLS, "[]"],
        "image_path": ["x.png", "", False],
    }
    for key in draw.sample(list(extras), draw.choice([0, 0, 0, 1, 1, 2])):
        record[key] = draw.choice(extras[key])
    return record if draw.random() < 0.9 else draw_messages(draw)


def draw_shape(draw: random.Random) -> dict[str, Any]:
    kind = draw.randrange(10)
    if kind < 5:
        return {draw.choice(["messages", "conversations"]): draw_messages(draw)}
    if kind < 6:
        return {"text": draw.choice([*SAID, 3])}
    if kind < 7:
        two = [draw.choice([*SAID, draw_messages(draw)]) for _ in range(2)]
        return {"prompt": two[0], "completion": two[1]}
    if kind < 8:
        return {
            key: draw.choice(SAID) for key in draw.choice(["instruction output", "instruction input output"]).split()
        }
    ids = [draw.randrange(250) for _ in range(draw.choice([1, 3, 5]))]
    found: dict[str, Any] = {"input_ids": ids}
    bits = [draw.randrange(2) for _ in ids]
    masks = {
        "labels": [id if bit else -100 for id, bit in zip(ids, bits, strict=True)],
        "loss_mask": bits,
        "assistant_masks": bits if draw.random() < 0.7 else [1 - bit for bit in bits],
        "completion_mask": bits[:-1] if draw.random() < 0.2 else bits,
        "attention_mask": [1] * (len(ids) - 1) + [draw.randrange(3)],
        "position_ids": list(range(len(ids))) if draw.random() < 0.7 else [0] * len(ids),
    }
    for key in draw.sample(list(masks), draw.choice([0, 1, 1, 2, 3])):
        found[key] = masks[key]
    return found
