"""Make of messages what a Hugging Face chat template is given: plain dicts whose calls have the form that it wants.

    Message   ->   plain()   ->   dict   ->   hf_template.py renders it

Strings are mended as everywhere else, empty calls are absent, and calls in OpenAI's wire form, which is JSON in a
string, are parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from nanopack.conversations.records import Message, short
from nanopack.errors import ConversationError
from nanopack.tokenizers.buffers import mended_text


def plain(index: int, message: Message, *, as_parts: bool, arguments_as_text: bool) -> dict[str, Any]:
    """Return the message as a dict; ConversationError where it holds parts that are no text, or calls that are none."""
    content = message.text
    if content is None:
        raise ConversationError(
            f"message {index}: content has parts that are not text; template='hf' takes a string or text parts"
        )
    content = mended(content)
    found = {"role": message.role, "content": [{"type": "text", "text": content}] if as_parts else content}
    for key, value in (message.rest or {}).items():
        if key == "tool_calls":
            where = f"message {index}: tool_calls"
            found[key] = [_call(f"{where}[{number}]", call, arguments_as_text) for number, call in enumerate(value)]
        elif key not in found:
            found[key] = mended(value)
    return found


def mended(value: Any) -> Any:
    """Return the value with U+FFFD for each lone surrogate in its strings."""
    if isinstance(value, str):
        return mended_text(value)
    if isinstance(value, Mapping):
        return {mended(key): mended(item) for key, item in value.items()}
    return [mended(item) for item in value] if isinstance(value, (list, tuple)) else value


def strings(value: object) -> Iterator[str]:
    """Yield all strings in it, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConversationError(f"{where} is the text {short(text)}, which is not JSON: {error}") from None


def _call(where: str, call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ConversationError(f"{where} is {short(call)}; it must be a dict with a function that has a name")
    assert isinstance(function, Mapping)
    call = mended(call) if function is not call else {}
    arguments = _arguments(where, function.get("arguments"), as_text)
    return {"type": "function", **call, "function": {**mended(function), "arguments": arguments}}


def _arguments(where: str, arguments: Any, as_text: bool) -> Any:
    """Return the arguments as a dict, or with `as_text` as the JSON of one."""
    wire = isinstance(arguments, str) and arguments.strip() != ""
    parsed = _parsed(arguments, f"{where}: arguments") if wire else arguments or {}
    if not isinstance(parsed, Mapping):
        raise ConversationError(f"{where}: arguments must be a dict or the JSON of one, not {short(arguments)}")
    if not as_text:
        return mended(parsed)
    return mended(arguments) if wire else json.dumps(mended(parsed), ensure_ascii=False)
