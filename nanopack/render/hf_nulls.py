"""Find the nulls that Arrow wrote into calls of tools, and that the model would learn to write.

    calls, tools   ->   refuse_nulls()   ->   ConversationError

Arrow gives every struct of a column the fields of all, null where one has none. Where nanopack reads a Dataset or a
file it leaves them out. Those of `list(dataset)` or `to_list()` are None like any other, but for what gives them away:
an argument that the tool does not have, two tools that share their arguments and never use the same, or a keyword of a
JSON schema that is null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from nanopack.conversations.records import Message
from nanopack.errors import ConversationError

REMEDY = (
    "Arrow gives every struct the fields of all, and list(dataset) or to_list() keep them as None; "
    "give the datasets.Dataset itself or its files, or leave out what is None"
)

# What a JSON schema may say of a null.
_OF_VALUES = {"default", "const", "enum", "example", "examples"}


def refuse_nulls(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Raise ConversationError where an argument of a call, or of a tool, is a null of Arrow's."""
    declared = {}
    for name, parameters in _parameters(tools or ()):
        if isinstance(properties := parameters.get("properties"), Mapping):
            declared[name] = properties
            if nulls := _nulls(properties):
                _refuse(f"tools: {name} has the parameter {nulls[0]!r}, which is null")
        for key in _null_keywords(parameters):
            _refuse(f"tools: {name} has {key!r} in its parameters, which is null")
    calls = [(index, *call) for index, message in enumerate(messages) for call in _calls(message)]
    for index, name, arguments in calls:
        for key in _nulls(arguments):
            where = f"message {index}: tool_calls: {name} has the argument {key!r}, which is null"
            if name in declared and key not in declared[name]:
                _refuse(f"{where} and no parameter of that tool")
            for _, other, others in calls:
                if other != name and others.keys() == arguments.keys() and _exclude(arguments, others):
                    _refuse(f"{where}, as {other} has others of the same")


def _parameters(tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the name of each tool that says which parameters it has, and the schema of these."""
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, Mapping) else None
        if isinstance(parameters, Mapping) and isinstance(function.get("name"), str):
            yield function["name"], parameters


def _null_keywords(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield each key of a JSON schema, or of one within, that is null and cannot be."""
    for key, value in schema.items():
        if value is None and key not in ("default", "const", "example"):
            yield key
        if key not in _OF_VALUES:
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(inner, Mapping):
                    yield from _null_keywords(inner)


def _calls(message: Message) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the name of each call, and its arguments where they are no text."""
    for call in (message.rest or {}).get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, Mapping):
            yield function.get("name"), arguments


def _nulls(found: Mapping[str, Any]) -> list[str]:
    return [key for key, value in found.items() if value is None]


def _exclude(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether both have arguments, and none that both use."""
    used, others = ({key for key, value in one.items() if value is not None} for one in (first, second))
    return bool(used and others) and not used & others


def _refuse(what: str) -> NoReturn:
    raise ConversationError(f"{what}: {REMEDY}")
