"""The slow packer's records: files read whole, records of every shape checked and brought into one.

    conversations   ->   open_records(), conversation()   ->   Record   ->   documents.py renders it

A part of the definition. It shares nothing with the fast path but the name of an error.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from nanopack.errors import ConversationError

FLOAT32_MAX = 3.4028234663852886e38
ROLES = {
    "system": ["system"],
    "developer": ["developer"],
    "user": ["user", "human", "prompter"],
    "assistant": ["assistant", "gpt", "chatgpt", "model", "bot", "ai", "bing", "bard", "function_call"],
    "tool": ["tool", "ipython", "observation", "function", "function_response"],
}
# Only a tokenizer's own chat template can write these.
WRITTEN_BY_HF = {
    *("tool_calls", "function_call", "tools", "functions", "tool_plan", "tool_responses", "tool_results"),
    *("tool_call", "arguments", "thinking_blocks"),
    *("reasoning_content", "reasoning", "reasoning_details", "thinking", "thoughts", "thought", "refusal"),
    *("citations", "images", "image", "videos", "video", "audios", "audio", "documents", "prefix"),
}
MASKS = ["loss_mask", "assistant_masks", "assistant_mask", "completion_mask", "response_mask"]
OF_TOKENS = [*MASKS, "labels", "attention_mask", "position_ids", "seq_lengths"]
# Nothing can honour these: in a record, in a message, in a part.
REFUSED_IN_RECORD = [
    *("functions", "images", "image", "videos", "video", "audios", "audio", "documents", "train", "training"),
    *("trainable", "masked", "loss_weight", "loss_weights", "sample_weight", "token_weights"),
    *("prompt_mask", "action_mask", "label_mask", "label_ids", "target_ids", "decoder_input_ids"),
    *("tool_calls", "function_call", "reasoning", "reasoning_content", "thinking", "thought", "thoughts"),
    *("chain_of_thought", "cot", "enable_thinking", "reasoning_effort"),
]
REFUSED_IN_MESSAGE = [
    *("mask", "loss_mask", "loss_scale", "loss_weight", "train_detail", "training_detail", "parts", "attachments")
]
REFUSED_IN_PART = [
    *("image", "image_url", "images", "audio", "input_audio", "video", "file", "document", "thinking", "reasoning"),
    *("weight", "train", "training", "trainable", "loss", "masked", "mask", "loss_mask"),
]
SYSTEMS = ["system", "system_prompt", "system_message", "system_instruction"]
MARKS = ["weight", "train", "training", "trainable", "is_trainable", "train_on_turn", "loss", "masked"]
# Whose other spellings are refused, and what else is known though it looks as if it mattered.
MATTERS = {
    "record": {*OF_TOKENS, *REFUSED_IN_RECORD, *SYSTEMS, "tools", "chat_template_kwargs", "mask"},
    "message": {*WRITTEN_BY_HF, *REFUSED_IN_MESSAGE, *MARKS},
    "part": {*REFUSED_IN_PART},
}
KNOWN = ["weight", "label", "kto_tag", "special_tokens_mask"]

# Reading: where each record stands, and a function that reads it. A broken line errs when its turn comes.

Stored = tuple[str, Callable[[], object]]


def open_records(conversations: Any) -> list[Stored]:
    """Return for every conversation where it stands, and a function that reads it."""
    paths = [conversations] if isinstance(conversations, (str, os.PathLike)) else conversations
    if isinstance(paths, (list, tuple)) and paths and isinstance(paths[0], (str, os.PathLike)):
        return [record for path in paths for file in _files(os.fspath(path)) for record in _file(file)]
    if type(conversations).__name__ == "Series":
        # by place, not by label
        conversations = list(conversations)
    read = conversations.__getitem__
    whole = conversations
    # torch's Subset has a dataset, its ConcatDataset several
    while type(whole).__module__.startswith("torch.utils.data") and {"dataset", "datasets"} & {*vars(whole)}:
        whole = whole.dataset if hasattr(whole, "dataset") else whole.datasets[0]
    if type(whole).__module__.startswith("datasets.") and whole.format["type"] != "custom":
        read = lambda index: _without_nulls(conversations[index], whole.features)  # noqa: E731
    return [(f"conversation {index}", partial(read, index)) for index in range(len(conversations))]


def _files(path: str) -> list[str]:
    # A file that is named like a pattern is meant itself.
    path = path if os.path.exists(path) else os.path.expanduser(path)
    found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not found:
        raise ValueError(f"conversations={path!r}: no such file. Pass a path or a pattern that matches.")
    return [file for path in found for file in (_folder(Path(path)) if os.path.isdir(path) else [path])]


def _folder(folder: Path) -> list[str]:
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        # A saved Dataset says which files are its own, in order.
        listed = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        return [str(folder / file["filename"]) for file in listed]
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name[0] not in "._")
    notes = ["dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json"]
    return [str(folder / name) for name in names if _kind(name) and name not in notes]


def _kind(path: str) -> str:
    """Return what a file holds by its name, "" where that is unknown."""
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    text = [kind for kind in ("jsonl", "ndjson", "json") if name.endswith(f".{kind}")]
    return (text or [kind for kind in ("parquet", "arrow") if path.lower().endswith(f".{kind}")] or [""])[0]


def _file(path: str) -> list[Stored]:
    kind = _kind(path)
    if kind in ("parquet", "arrow"):
        return [(f"{path} row {index}", partial(dict, row)) for index, row in enumerate(_rows(path, kind))]
    if not kind:
        raise ValueError(f"conversations={path!r}: unknown kind. Pass files of JSON, Parquet or Arrow.")
    data = Path(path).read_bytes()
    if path.lower().endswith(".gz"):
        data = gzip.decompress(data)
    if path.lower().endswith(".zst"):
        import zstandard

        with zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(data, read_across_frames=True) as stream:
            data = stream.read()
    data = data.removeprefix(codecs.BOM_UTF8)
    if kind == "json" and data.lstrip().startswith(b"["):
        return [(f"{path} element {k}", partial(_parse, part)) for k, part in enumerate(_elements(path, data))]
    numbered = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    return [(f"{path}:{number}", partial(_parse, line)) for number, line in numbered]


def _parse(line: bytes) -> object:
    # Decoded here: json.loads would guess at UTF-16 too.
    return json.loads(line.decode())


def _elements(path: str, data: bytes) -> list[bytes]:
    """Return the elements of a JSON array, byte by byte."""
    elements, depth, in_string, backslashes, begin = [], 0, False, 0, 0
    for place, byte in enumerate(data):
        char = chr(byte)
        if char == '"' and backslashes % 2 == 0:
            in_string = not in_string
        backslashes = backslashes + 1 if char == "\\" else 0
        if in_string:
            continue
        depth += (char in "[{") - (char in "]}")
        if char in "[{" and depth == 1:
            begin = place + 1
        elif (char == "," and depth == 1) or (char in "]}" and depth == 0):
            elements.append(data[begin:place])
            begin = place + 1
        if char in "]}" and depth == 0:
            if data[begin:].strip(b" \t\r\n"):
                raise ValueError(f"{path}: something follows the array.")
            return [] if len(elements) == 1 and not elements[0].strip(b" \t\r\n") else elements
    raise ValueError(f"{path}: the array does not end.")


def _rows(path: str, kind: str) -> list[dict[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet

    if kind == "parquet":
        table = pyarrow.parquet.read_table(path)
    else:
        data = Path(path).read_bytes()
        opened = pa.ipc.open_file if data.startswith(b"ARROW1") else pa.ipc.open_stream
        table = opened(io.BytesIO(data)).read_all()
    types = {field.name: field.type for field in table.schema}
    return [{name: _from_arrow(value, types[name]) for name, value in row.items()} for row in table.to_pylist()]


def _from_arrow(value: Any, kind: Any) -> Any:
    """Return an Arrow value as JSON would have it: every struct of a column has the fields of all, null for none."""
    import pyarrow as pa

    if value is None:
        return None
    if "arrow.json" in str(kind) and not pa.types.is_nested(kind):
        return json.loads(value)
    if pa.types.is_struct(kind):
        kinds = {field.name: field.type for field in kind}
        return {name: _from_arrow(item, kinds[name]) for name, item in value.items() if item is not None}
    if pa.types.is_map(kind):
        return {key: _from_arrow(item, kind.item_type) for key, item in value}
    return [_from_arrow(item, kind.value_type) for item in value] if isinstance(value, list) else value


def _without_nulls(value: Any, feature: Any) -> Any:
    """Return what a Dataset hands out without the nulls that Arrow put into its structs."""
    if type(feature).__name__ == "Json" or not isinstance(value, (dict, list)):
        return value
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    if isinstance(value, list):
        return [_without_nulls(item, inner) for item in value]
    fields = inner if isinstance(inner, dict) else {}
    return {key: _without_nulls(item, fields.get(key)) for key, item in value.items() if item is not None}


# Checking: every accepted shape becomes one. The template that renders the messages checks what they are.

Tokens = list[tuple[int, bool]]


class Said(NamedTuple):
    """A message."""

    role: str
    content: str | list[tuple[str, str]]
    """A string, or parts as (type, text)."""
    rest: dict[str, Any]
    """What else it holds."""
    train: bool = True
    """False: nothing of it is in the loss."""

    def string(self, index: int) -> str:
        """Return the content as a string; ConversationError where it has parts that are not text."""
        if isinstance(self.content, str):
            return self.content
        if any(kind != "text" for kind, _ in self.content):
            raise ConversationError(f"message {index}: content has parts that are not text")
        return "".join(text for _, text in self.content)


@dataclass
class Record:
    """A record of any shape: messages, a text, or tokens (id, in the loss)."""

    messages: list[Said]
    text: str | None = None
    tokens: Tokens | None = None
    weight: float = 1.0
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None


def conversation(record: object) -> Record:
    """Return what a record says; ConversationError where it is none, or something in it cannot be honoured."""
    if isinstance(record, (list, tuple)) or _is_array(record):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise ConversationError(f"it is a {type(record).__name__}; it must be a dict or a list of messages")
    # A Parquet file has every column in every row: what is null is not there. pandas writes it as NaN.
    held = {key: value for key, value in record.items() if not _is_none(value) and not _is_nan(key, value)}
    shapes = [key for key in ("messages", "conversations", "text", "input_ids") if key in held]
    shapes += ["prompt"] if {"prompt", "completion"} <= {*held} else []
    shapes += ["instruction"] if {"instruction", "output"} <= {*held} else []
    if len(shapes) != 1:
        raise ConversationError(f"it must have exactly one of messages, conversations, text, ..., and has {shapes}")
    [shape] = shapes
    for key in [*REFUSED_IN_RECORD, *(OF_TOKENS if shape != "input_ids" else [])]:
        if key in held and (key in OF_TOKENS or not _empty(held[key])):
            raise ConversationError(f"its {key} cannot be honoured")
    if not _empty(held.get("mask")) and (
        shape in ("text", "input_ids") or not isinstance(held["mask"], str) or _role(held["mask"]) != "user"
    ):
        raise ConversationError("its mask says nothing that can be honoured")
    if any(held.get(key) is False or repr(held.get(key)) == "np.False_" for key in ("label", "kto_tag")):
        raise ConversationError("its label says that its answer is not to be learnt")
    said_before = {"prompt": ["input", "history", "context"], "instruction": ["context"]}.get(shape, [])
    if any(not _empty(held.get(key)) for key in said_before):
        raise ConversationError(f"it has one of {said_before}, which its shape does not read")
    if shape in ("text", "input_ids") and _role(held.get("role")):
        raise ConversationError("it is a message")
    _refuse_suspects("record", {key: value for key, value in held.items() if not _empty(value)})
    beside = [key for key in (*SYSTEMS, "tools", "chat_template_kwargs") if not _empty(held.get(key))]
    if beside and shape in ("text", "input_ids"):
        raise ConversationError(f"its {beside} belong to messages")
    found = Record([], weight=_weight(held.get("weight")))
    if shape == "text":
        found.text = _text(held["text"], "text")
    elif shape == "input_ids":
        found.tokens = _ready(held)
    elif shape == "prompt":
        asked, answered = held["prompt"], held["completion"]
        asked = _messages([{"role": "user", "content": asked}] if isinstance(asked, str) else asked)
        answers = _messages([{"role": "assistant", "content": answered}] if isinstance(answered, str) else answered)
        found.messages = [message._replace(train=False) for message in asked] + answers
    elif shape == "instruction":
        found.messages = _instructed(held)
    else:
        found.messages = _messages(held[shape])
    for key in beside:
        if key in SYSTEMS:
            if found.messages[0].role in ("system", "developer"):
                raise ConversationError(f"it has a system message and {key}")
            text = held[key] if isinstance(held[key], str) else _parts(held[key])
            found.messages.insert(0, Said("system", text, {}))
    found.tools = _dicts(held["tools"]) if "tools" in beside else None
    if "chat_template_kwargs" in beside:
        found.template_kwargs = _json(held["chat_template_kwargs"])
        if not isinstance(found.template_kwargs, dict):
            raise ConversationError("its chat_template_kwargs must be a dict")
        found.template_kwargs = {name: one for name, one in found.template_kwargs.items() if one is not None} or None
    return found


def _refuse_suspects(where: str, held: Mapping[Any, Any]) -> None:
    """Raise ConversationError for a key that is not known, and by its name and value may matter."""
    for name, value in held.items():
        if name in MATTERS[where] or (where == "record" and name in KNOWN):
            continue
        snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower()
        words = {word for word in re.split("[^a-z]+", snake) if word}
        if "_".join(word for word in re.split("[^a-z]+", snake) if word) in MATTERS[where]:
            raise ConversationError(f"its {name} is another spelling of a key that matters")
        media = {"image", "images", "video", "videos", "audio", "audios", "pixel"}
        loss = {"train", "trained", "training", "trainable", "loss", "mask", "masks", "masked", "weight", "weights"}
        loss |= {"label", "labels", "learn", "supervised", "ignore", "ignored"}
        if (words & loss and _says_yes_or_no(value)) or (words & media and not words & loss and value is not False):
            raise ConversationError(f"its {name} may matter")


def _says_yes_or_no(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower() in ("true", "false", "yes", "no", "0", "1")
    if isinstance(value, Real):
        return 0 <= float(value) <= 1
    if isinstance(value, (list, tuple)):
        return isinstance(value[0], Real)
    return getattr(getattr(value, "dtype", "O"), "kind", "i" if hasattr(value, "dtype") else "O") in "biuf"


def _is_none(value: object) -> bool:
    return value is None or str(type(value)).endswith(".NAType'>")


def _is_nan(key: str, value: object) -> bool:
    return isinstance(value, float) and value != value and key != "weight"


def _empty(value: Any) -> bool:
    """Return whether a value says nothing."""
    if isinstance(value, str):
        return value.strip() in ("[]", "{}", "null", '""') or value == ""
    if isinstance(value, (list, tuple, Mapping)) or type(value).__name__ == "ndarray":
        return len(value) == 0
    return _is_none(value) or str(value) == "NaT" or (isinstance(value, Real) and bool(value != value))


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and str(getattr(value, "dtype", "")) == "object" and value.ndim == 1


def _plain(value: Any, of_array: bool = False) -> Any:
    """Return lists and dicts. pandas makes arrays of what came from Arrow, so null means absent in them."""
    if type(value).__module__ in ("numpy", "torch"):
        return _plain(value.tolist(), True)
    if isinstance(value, (list, tuple)):
        return [_plain(item, of_array) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item, of_array) for key, item in value.items() if not (of_array and item is None)}
    return value


def _list(value: Any) -> Any:
    """Return a list where an object array stands for one, or a dict of lists as long as each other."""
    if _is_array(value):
        return _plain(value)
    if isinstance(value, Mapping) and any(key in value for key in ("content", "value", "text")):
        columns = {key: _list(column) for key, column in value.items() if column is not None}
        if all(isinstance(c, (list, tuple)) for c in columns.values()) and len({len(c) for c in columns.values()}) == 1:
            length = len(next(iter(columns.values())))
            return [{key: c[i] for key, c in columns.items() if c[i] is not None} for i in range(length)]
    return value


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return _plain(value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{value[:40]!r} is not JSON") from error


def _dicts(value: Any) -> list[Any]:
    items = _json(value)
    items = [_json(item) for item in items] if isinstance(items, list) else items
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ConversationError("its tools or tool_calls must be a list of dicts")
    return items


def _weight(weight: Any) -> float:
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= float(weight) <= FLOAT32_MAX:
        raise ConversationError(f"weight is {weight!r}; it must be a number from 0 that float32 can hold")
    return float(weight)


def _text(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise ConversationError(f"its {name} must be a string")
    return text


def _role(name: object) -> str | None:
    names = {other: role for role, others in ROLES.items() for other in others}
    return names.get(name.strip().lower()) if isinstance(name, str) else None


def _instructed(held: Mapping[str, Any]) -> list[Said]:
    said = []
    pairs = _list(held.get("history", []))
    for pair in pairs if isinstance(pairs, (list, tuple)) else [pairs]:
        pair = _list(pair)
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ConversationError("its history must be a list of pairs")
        said += [Said("user", _text(pair[0], "history"), {}), Said("assistant", _text(pair[1], "history"), {})]
    asked = [_text(held[key], key) for key in ("instruction", "input") if key in held]
    said.append(Said("user", "\n".join(text for text in asked if text != ""), {}))
    return [*said, Said("assistant", _text(held["output"], "output"), {})]


def _messages(messages: Any) -> list[Said]:
    messages = _list(messages)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConversationError("its messages must be a list of at least one")
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: Any) -> Said:
    if not isinstance(message, Mapping):
        raise ConversationError(f"message {index}: it must be a dict")
    held = {key: value for key, value in message.items() if value is not None}
    if {"role", "from"} <= {*held} or {"content", "value"} <= {*held}:
        raise ConversationError(f"message {index}: it has role and from, or content and value")
    role = _role(held.get("role", held.get("from")))
    if role is None:
        raise ConversationError(f"message {index}: its role is unknown")
    rest, marks = {}, []
    for key, value in held.items():
        if key in ("role", "from", "content", "value") or _empty(value):
            continue
        if key in MARKS:
            marks.append(_mark(index, key, value, role) != (key == "masked"))
        elif key in REFUSED_IN_MESSAGE:
            raise ConversationError(f"message {index}: its {key} cannot be honoured")
        elif not (key in WRITTEN_BY_HF and value is False):
            rest[key] = _dicts(value) if key == "tool_calls" else _plain(value)
            _refuse_suspects("message", {key: value})
    if len({*marks}) > 1:
        raise ConversationError(f"message {index}: it contradicts itself about the loss")
    content = held.get("content", held.get("value"))
    if content is None and {*rest} & WRITTEN_BY_HF:
        # A call of a tool may come without words.
        content = ""
    return Said(role, content if isinstance(content, str) else _parts(content), rest, all(marks))


def _mark(index: int, key: str, value: Any, role: str) -> bool:
    if (not isinstance(value, Real) and type(value).__name__ not in ("bool", "bool_")) or value not in (0, 1):
        raise ConversationError(f"message {index}: its {key} must be 0 or 1")
    if value and role != "assistant" and key not in ("weight", "masked"):
        raise ConversationError(f"message {index}: its {key} asks to train what the assistant does not say")
    return bool(value)


def _parts(content: Any) -> list[tuple[str, str]]:
    content = _list(content)
    if not isinstance(content, (list, tuple)):
        raise ConversationError("a content must be a string or a list of parts")
    parts = []
    for part in content:
        if not isinstance(part, Mapping):
            raise ConversationError("a part must be a dict")
        kind = {"input_text": "text", "output_text": "text"}.get(str(part.get("type")), part.get("type"))
        if kind not in ("text", "python", "python_output") or not isinstance(part.get("text"), str):
            raise ConversationError("a part is not a text, python or python_output with a text")
        if refused := [key for key in REFUSED_IN_PART if not _empty(part.get(key))]:
            raise ConversationError(f"a part's {refused} cannot be honoured")
        _refuse_suspects("part", {key: item for key, item in part.items() if not _empty(item)})
        parts.append((kind, part["text"]))
    return parts


def _ready(held: Mapping[str, Any]) -> Tokens:
    ids = _numbers(held["input_ids"], "input_ids")
    marks = {key: [_bit(key, bit) for bit in _numbers(held[key], key)] for key in MASKS if key in held}
    if "labels" in held:
        labels = _numbers(held["labels"], "labels")
        if len(labels) != len(ids) or any(label not in (-100, id) for label, id in zip(labels, ids, strict=True)):
            raise ConversationError("its labels are neither -100 nor the input_ids beside them")
        marks["labels"] = [label != -100 for label in labels]
    kept = [True] * len(ids)
    if "attention_mask" in held:
        kept = [_bit("attention_mask", bit) for bit in _numbers(held["attention_mask"], "attention_mask")]
    if any(len(mark) != len(ids) for mark in [kept, *marks.values()]):
        raise ConversationError(f"it has {len(ids)} input_ids and a mask of another length")
    tokens = []
    for place, id in enumerate(ids):
        said = {mark[place] for mark in marks.values()} or {True}
        if isinstance(id, bool) or not isinstance(id, Integral):
            raise ConversationError(f"input_ids has {id!r}")
        if kept[place] and len(said) > 1:
            raise ConversationError(f"its masks contradict each other at token {place}")
        if kept[place]:
            tokens.append((int(id), said.pop()))
    if not tokens:
        raise ConversationError("it has no tokens")
    _one_document(held, kept)
    return tokens


def _one_document(held: Mapping[str, Any], kept: list[bool]) -> None:
    """Refuse what was packed of several documents."""
    positions = _numbers(held.get("position_ids", list(range(len(kept)))), "position_ids")
    if len(positions) != len(kept):
        raise ConversationError("it has more or fewer position_ids than input_ids")
    if any(not isinstance(position, Integral) or isinstance(position, bool) for position in positions):
        raise ConversationError("its position_ids are not ints")
    positions = [position for position, keep in zip(positions, kept, strict=True) if keep and "position_ids" in held]
    if any(positions[i + 1] - positions[i] != 1 for i in range(len(positions) - 1)):
        raise ConversationError("its position_ids do not count up by 1")
    for key, most in (("seq_lengths", 1), ("seq_start_id", 1), ("cu_seqlens", 2)):
        if len(_numbers(held.get(key, []), key)) > most:
            raise ConversationError(f"its {key} shows several documents")
    for key in ("segment_ids", "sequence_ids", "seq_idx", "doc_ids", "document_ids"):
        segments = _numbers(held.get(key, [0] * len(kept)), key)
        if len(segments) != len(kept) or len({one for one, keep in zip(segments, kept, strict=True) if keep}) > 1:
            raise ConversationError(f"its {key} shows several documents")


def _numbers(values: Any, name: str) -> list[Any]:
    # of whatever array or tensor they come in
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)):
        raise ConversationError(f"its {name} must be a list")
    if len({isinstance(value, bool) for value in values}) > 1:
        raise ConversationError(f"its {name} mixes bools with numbers")
    return list(values)


def _bit(name: str, bit: Any) -> bool:
    if isinstance(bit, float) or not isinstance(bit, Integral) or bit not in (0, 1):
        raise ConversationError(f"its {name} has {bit!r}; it must be 0 or 1")
    return bool(bit)


def choose(messages: list[Said], loss: str, first_assistant: str) -> list[Said]:
    """Return the messages as the arguments `loss` and `first_assistant` want them."""
    front = messages[:1] if messages and messages[0].role in ("system", "developer") else []
    others = messages[len(front) :]
    if first_assistant != "keep" and others and others[0].role == "assistant":
        if first_assistant == "raise":
            raise ConversationError("it begins with the assistant")
        if first_assistant == "empty_user":
            others = [Said("user", "", {}), *others]
        while first_assistant == "drop" and others and others[0].role != "user":
            others = others[1:]
        if not others:
            raise ConversationError("it has no message of a user")
    messages = [*front, *others]
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if loss != "last" or not messages:
        return messages
    return [
        message._replace(train=message.train and index == (answers[-1] if answers else 0))
        for index, message in enumerate(messages)
    ]
