"""The slow packer's way to run a tokenizer's own chat template: what it is given, and what it writes.

    messages, tools   ->   ChatWriter.given()   ->   ChatWriter.write()   ->   chat.py says what is in the loss

A part of the definition, written apart from the fast path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nanopack.errors import ConversationError
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer

Said = tuple[str, str, Mapping[str, Any], bool]
"""Role, content, what else the message holds, and whether it may be in the loss."""


class ChatWriter:
    """One chat template. What it says of special tokens is tried out once."""

    def __init__(self, coder: HuggingFaceTokenizer) -> None:
        """`coder` has a chat template."""
        self.coder = coder
        source = coder.chat_template(tools=True) + coder.chat_template(tools=False)
        asked = re.findall(r"""(['"])((?:(?!\1).)+)\1\s*(?:not\s+)?in\b""", source)
        asked += re.findall(r"""\.(?:split|startswith|endswith|replace|find)\(\s*(['"])((?:(?!\1).)+)\1""", source)
        tags = re.findall(r"""</?[^<>\s'"/{%][^<>\s'"{%]{0,40}>""", source)
        found = {"<think>", "</think>", *tags, *(text for _, text in asked)}
        self.kept_texts = sorted((text for text in found if len(text) > 1 and "\\" not in text), key=len, reverse=True)
        user: dict[str, Any] = {"role": "user", "content": "Hi"}
        assistant: dict[str, Any] = {"role": "assistant", "content": "Oh"}
        self.parts = False
        if not self.writes([user, assistant], "Hi", "Oh"):
            as_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (user, assistant)]
            listed = ("'text': 'Hi'", '"text": "Hi"', '"text":"Hi"')
            if self.writes(as_parts, "Hi", "Oh") and not any(self.writes(as_parts, form) for form in listed):
                self.parts, (user, assistant) = True, as_parts
        four = [user, assistant] * 2
        around = [self.try_write(four), self.try_write(four, ask=True)]
        if around == [None, None]:
            around = [self.try_write(four[:2]), self.try_write(four[:1], ask=True)]
        written = "".join(text or "" for text in around)
        used = [t for t in coder.added_tokens if t.strip() and t in source + written]
        # No message may hold these; the others are for the assistant to say.
        self.control = {t for t in used if t in written and "think" not in t.lower()} | set(coder.special_tokens)
        self.said_only = set(used) - self.control
        self.question = self.try_write([user]) or ""
        self.asking = self.try_write([user], ask=True) or ""
        args = {"probe_key": "probe value"}
        calling = {**assistant, "content": [] if self.parts else ""}
        mapped = self.try_write([user, {**calling, "tool_calls": [_call("probe_call", args)]}]) or ""
        encoded = self.try_write([user, {**calling, "tool_calls": [_call("probe_call", json.dumps(args))]}]) or ""
        fits = "probe_call" in mapped and "probe value" in mapped and "{'probe_key'" not in mapped
        self.text_arguments = not fits and json.dumps(args) in encoded
        tool = {
            "name": "probe_tool",
            "description": "probe description",
            "parameters": {
                "type": "object",
                "properties": {"probe_key": {"type": "string", "description": "probe text"}},
            },
        }
        text = self.try_write([user], [{"type": "function", "function": tool}]) or ""
        self.writes_tools = all(word in text for word in ("probe_tool", "probe description", "probe_key"))

    def writes(self, messages: Sequence[Mapping[str, Any]], *words: str) -> bool:
        """Return whether all the words are in the text of the messages."""
        text = self.try_write(messages) or ""
        return all(word in text for word in words)

    def try_write(self, messages: Any, tools: Any = None, given: Any = None, ask: bool = False) -> str | None:
        """Return the text of the messages, None where they are refused."""
        try:
            return self.write(messages, tools, given or {}, ask)
        except ConversationError:
            return None

    def write(self, messages: Any, tools: Any, given: Mapping[str, Any], ask: bool = False) -> str:
        """Return the text of the messages."""
        if not messages:
            return self.spans_and_text(messages, tools, given, ask)[1]
        chat, source = self.coder.chat, self.coder.chat_template(tools=bool(tools))
        try:
            return str(
                chat.apply_chat_template(
                    messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=ask, **given
                )
            )
        except MemoryError:
            raise
        except Exception as error:
            raise ConversationError(f"its chat template refuses it: {error!r}") from error

    def spans_and_text(self, messages: Any, tools: Any, given: Any, ask: bool) -> tuple[list[tuple[int, int]], str]:
        """Return the spans that {% generation %} marks, and the text."""
        import transformers.utils.chat_template_utils as of_transformers

        render: Any = of_transformers.render_jinja_template
        variables = {**self.coder.chat.special_tokens_map, **given, "add_generation_prompt": ask}
        source = self.coder.chat_template(tools=bool(tools))
        marks = self.is_marked(tools) and not ask
        try:
            texts, spans = render(
                [messages], tools=tools, chat_template=source, return_assistant_tokens_mask=marks, **variables
            )
        except MemoryError:
            raise
        except Exception as error:
            raise ConversationError(f"its chat template refuses it: {error!r}") from error
        return [tuple(span) for span in spans[0]] if marks else [], str(texts[0])

    def is_marked(self, tools: Any) -> bool:
        """Return whether the template marks what is in the loss."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.coder.chat_template(tools=bool(tools))) is not None

    # What the template is given

    def given(self, messages: Sequence[Said], tools: Any, given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the messages as dicts; ConversationError for what would become something else."""
        said = [self._message(index, *message) for index, message in enumerate(messages)]
        for index, message in enumerate(said):
            closed = self.control if message["role"] == "assistant" else self.control | self.said_only
            for token in closed:
                if token in _text_of(message):
                    raise ConversationError(f"message {index}: {token!r} in it would become a special token")
        for token in self.control | self.said_only:
            if token in _text_of([tools, given]):
                raise ConversationError(f"{token!r} in its tools or variables would become a special token")
        for name in given:
            if re.search(rf"\b{re.escape(name)}\b", self.coder.chat_template(tools=bool(tools))) is None:
                raise ConversationError(f"the chat template does not read {name!r}")
        if tools and not self.writes_tools:
            raise ConversationError("the chat template does not write tools")
        _refuse_nulls(messages, tools or [])
        return said

    def _message(self, index: int, role: str, content: str, rest: Mapping[str, Any], _: bool) -> dict[str, Any]:
        said = [{"type": "text", "text": content}] if self.parts else content
        message: dict[str, Any] = {"role": role, "content": said}
        for key, value in rest.items():
            if key != "tool_calls" and key not in message:
                message[key] = value
        calls = rest.get("tool_calls")
        if not calls:
            return dict(mend(message))
        message["tool_calls"] = []
        for call in calls:
            function = call.get("function", call)
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
                raise ConversationError(f"message {index}: a call has no function with a name")
            arguments = function.get("arguments")
            parsed = _json(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
            if isinstance(arguments, str) and not arguments.strip():
                parsed = {}
            if not isinstance(parsed, Mapping):
                raise ConversationError(f"message {index}: the arguments of a call are no dict")
            if self.text_arguments and not (isinstance(arguments, str) and arguments.strip()):
                arguments = json.dumps(mend(parsed), ensure_ascii=False)
            elif not self.text_arguments:
                arguments = parsed
            outer = call if "function" in call else {}
            message["tool_calls"].append(
                {"type": "function", **outer, "function": {**function, "arguments": arguments}}
            )
        return dict(mend(message))


def _refuse_nulls(messages: Sequence[Said], tools: Sequence[Any]) -> None:
    """Refuse arguments that Arrow made: of a tool that does not have them, or of two that use none in common."""
    known = {}
    for tool in tools:
        tool = tool.get("function", tool)
        parameters = tool.get("parameters") if isinstance(tool, Mapping) else None
        if not isinstance(parameters, Mapping) or not isinstance(tool.get("name"), str):
            continue
        properties = parameters.get("properties")
        if isinstance(properties, Mapping):
            known[tool["name"]] = properties
            if None in properties.values():
                raise ConversationError("a parameter of a tool is null")
        if _has_null(parameters):
            raise ConversationError("what is said of a tool's parameters is null")
    calls = [call.get("function", call) for _, _, rest, _ in messages for call in rest.get("tool_calls") or []]
    calls = [call for call in calls if isinstance(call.get("arguments"), Mapping)]
    for call in calls:
        given = call["arguments"]
        null = {key for key in given if given[key] is None}
        if call["name"] in known and not null <= {*known[call["name"]]}:
            raise ConversationError("a null argument is none of the tool's")
        for other in calls:
            its = other["arguments"]
            if null and other["name"] != call["name"] and {*its} == {*given}:
                both = [key for key in given if given[key] is not None and its[key] is not None]
                if not both and {*given} - null and any(value is not None for value in its.values()):
                    raise ConversationError("two tools have the same arguments and use none in common")


def _has_null(schema: Any) -> bool:
    """Return whether anything but a value that a JSON schema names is null in it."""
    if isinstance(schema, (list, tuple)):
        return any(_has_null(item) for item in schema if item is not None)
    if not isinstance(schema, Mapping):
        return schema is None
    said = {key: schema[key] for key in schema if key not in ("default", "const", "example", "enum", "examples")}
    unsaid = [key for key in ("enum", "examples") if key in schema and schema[key] is None]
    return bool(unsaid) or any(_has_null(value) for value in said.values())


def mend(value: Any) -> Any:
    """Return the value with U+FFFD for lone surrogates."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, Mapping):
        return {mend(key): mend(item) for key, item in value.items()}
    return [mend(item) for item in value] if isinstance(value, (list, tuple)) else value


def _call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConversationError(f"the text of a call is not JSON: {error}") from None


def _text_of(value: object) -> str:
    """Return all strings in it, one under the other."""
    if isinstance(value, Mapping):
        return "\n".join(_text_of(item) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple)):
        return "\n".join(_text_of(item) for item in value)
    return value if isinstance(value, str) else ""
