"""Run a chat template on strings that watch what it does with them.

    marked messages   ->   Watcher.watch()   ->   which texts it looked for in them; None where it looked otherwise

A template that only writes its strings, strips them and looks for texts in them that are not there does the same with
all other strings without these texts. So its text for one conversation is that of every other of the same shape.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import GeneratorType
from typing import Any

# What these filters do with a string, its methods see; or they do nothing with the strings in a container.
_SEEN = {"trim", "string", "default", "d", "replace"}
_OF_CONTAINERS = {"length", "count", "list", "first", "last", "reverse", "selectattr", "rejectattr", "items"} | _SEEN

# The name of `%` in a template that is watched.
_MODULO = "nanopack_modulo"


class Watch:
    """What was done with the strings of one conversation."""

    def __init__(self) -> None:
        self.looked_for: set[str] = set()
        self.depends = False
        """Whether the template's text may depend on the strings in another way."""


class Watched(str):
    """A string with marks in it, for each of which any other could stand that is not blank."""

    watch: Watch
    bare: bool
    """Whether there is one mark in it, and only white space besides."""

    @classmethod
    def of(cls, text: str, watch: Watch, *, bare: bool = True) -> Watched:
        made = cls(text)
        made.watch, made.bare = watch, bare
        return made

    def _look_for(self, text: str) -> bool:
        """Return whether the text is in this one, and note it where it is not."""
        found = str.__contains__(self, text)
        if found and not text.strip():
            # In white space around the mark, which is part of a conversation's shape.
            return True
        self.watch.depends |= found or not self.bare
        self.watch.looked_for.add(text)
        return found

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Any:
        return joined([self, other])

    def __radd__(self, other: str) -> Any:
        return joined([other, self])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Watched):
            self.watch.depends = True
        elif isinstance(other, str) and other.strip():
            self._look_for(other)
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        self.watch.depends = True
        return str.__hash__(self)

    def __contains__(self, text: object) -> bool:
        return self._look_for(str(text))

    def startswith(self, text: Any, *rest: Any) -> bool:
        return self._at_an_end(str.startswith, text, rest)

    def endswith(self, text: Any, *rest: Any) -> bool:
        return self._at_an_end(str.endswith, text, rest)

    def _at_an_end(self, stands: Callable[[str, str], bool], texts: Any, rest: Any) -> bool:
        self.watch.depends |= bool(rest)
        for text in texts if isinstance(texts, tuple) else (texts,):
            self.watch.looked_for.add(text)
            self.watch.depends |= not self.bare
            if stands(self, text):
                self.watch.depends |= bool(text.strip())
                return True
        return False

    def _stripped(self, strip: Callable[..., str], characters: str | None) -> Watched:
        self.watch.depends |= bool(characters and characters.strip())
        return Watched.of(strip(self, characters), self.watch, bare=self.bare)

    def strip(self, characters: str | None = None) -> Watched:
        return self._stripped(str.strip, characters)

    def lstrip(self, characters: str | None = None) -> Watched:
        return self._stripped(str.lstrip, characters)

    def rstrip(self, characters: str | None = None) -> Watched:
        return self._stripped(str.rstrip, characters)

    def split(self, separator: str | None = None, maxsplit: int = -1) -> list[Any]:  # type: ignore[override]
        self.watch.depends |= separator is None or self._look_for(separator)
        return [self]

    rsplit = split  # type: ignore[assignment]

    def replace(self, old: str, new: str, count: int = -1) -> Watched:  # type: ignore[override]
        self.watch.depends |= self._look_for(old)
        return self


def _depending(name: str) -> Any:
    method = getattr(str, name)

    def depends(self: Watched, *arguments: Any, **named: Any) -> Any:
        self.watch.depends = True
        return method(self, *arguments, **named)

    return depends


# Whatever else a string can do tells something of it.
for _name in set(dir(str)) - set(vars(Watched)) - set(dir(object)) | {"__lt__", "__le__", "__gt__", "__ge__"}:
    setattr(Watched, _name, _depending(_name))
for _name in ("__format__", "__repr__"):
    setattr(Watched, _name, _depending(_name))


def joined(parts: Iterable[Any]) -> Any:
    """Return the parts in one string, watched where one of them is."""
    parts = list(parts)
    found = [part for part in parts if isinstance(part, Watched)]
    text = "".join([str.__str__(part) for part in parts])
    if not found:
        return text
    blank = not any(part.strip() for part in parts if not isinstance(part, Watched))
    return Watched.of(text, found[0].watch, bare=blank and len(found) == 1 and found[0].bare)


class Watcher:
    """A chat template of its own, whose every way to look into a string is watched."""

    def __init__(self, template: Any, source: str) -> None:
        """`template` is the template as transformers compiles it, for this alone; `source` is its text."""
        self._watch = Watch()
        environment = template.environment
        environment.filters[_MODULO] = operator.mod
        self._template = template = environment.from_string(_with_calls(environment, source))
        environment.concat = joined
        module = template.root_render_func.__globals__
        module["str_join"] = module["markup_join"] = lambda parts: joined(map(str, parts))
        for name, filtering in list(environment.filters.items()):
            environment.filters[name] = self._watched_filter(name, filtering)
        for name in ("iterable", "sequence"):
            environment.tests[name] = _or_watched(environment.tests[name])
        environment.tests["in"] = self._is_in
        environment.call = self._watched_call(environment.call)

    def watch(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> tuple[str, set[str]] | None:
        """Return the text, and the texts that the contents must not hold; None where it depends on them otherwise."""
        self._watch = watch = Watch()
        watched = [{**message, "content": Watched.of(message["content"], watch)} for message in messages]
        blocks = self._template.generate(
            messages=watched, tools=None, documents=None, add_generation_prompt=False, **variables
        )
        text = "".join([str.__str__(block) for block in blocks])
        return None if watch.depends else (text, watch.looked_for)

    def _is_in(self, value: Any, container: Any) -> bool:
        # a string looks for another in itself
        if isinstance(value, Watched) and isinstance(container, str):
            self._watch.depends = True
        return value in container

    def _watched_filter(self, name: str, filtering: Callable[..., Any]) -> Callable[..., Any]:
        def filtered(*arguments: Any, **named: Any) -> Any:
            values = [*arguments, *named.values()]
            if name not in _SEEN and any(isinstance(value, Watched) for value in values):
                self._watch.depends = True
            if name not in _OF_CONTAINERS and any(map(_holds_watched, values)):
                self._watch.depends = True
            return filtering(*arguments, **named)

        return filtered

    def _watched_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(context: Any, what: Any, *arguments: Any, **named: Any) -> Any:
            # A string's method, such as join or format, writes what it is given into a string that is not watched.
            if type(getattr(what, "__self__", None)) is str and _holds_watched([*arguments, *named.values()]):
                self._watch.depends = True
            return call(context, what, *arguments, **named)

        return called


def _with_calls(environment: Any, source: str) -> Any:
    """Return the template's syntax tree, with calls in place of the operators that a plain string answers itself."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Transformer(NodeTransformer):
        def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
            self.generic_visit(node)
            if [operand.op for operand in node.ops] not in (["in"], ["notin"]):
                return node
            test = nodes.Test(node.expr, "in", [node.ops[0].expr], [], None, None, lineno=node.lineno)
            return test if node.ops[0].op == "in" else nodes.Not(test, lineno=node.lineno)

        def visit_Mod(self, node: nodes.Mod) -> nodes.Node:
            self.generic_visit(node)
            return nodes.Filter(node.left, _MODULO, [node.right], [], None, None, lineno=node.lineno)

    tree = Transformer().visit(environment.parse(source))
    return tree.set_environment(environment)


def _holds_watched(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_watched, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_watched, value))
    # What a generator holds is not seen before it is used.
    return isinstance(value, (Watched, GeneratorType))


def _or_watched(test: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, *arguments: isinstance(value, Watched) or test(value, *arguments)
