"""Strings that watch what a chat template does with them.

    a marked message   ->   Watched.of()   ->   the template   ->   Watch: which texts it looked for in it

A template may write a string, strip it and look for texts in it that are not there: it does the same with all other
strings without these texts. Whatever else it does tells something of the string, and the watch notes that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Watch:
    """What was done with the strings of one conversation."""

    def __init__(self) -> None:
        self.looked_for: set[str] = set()
        self.depends = False
        """Whether the template's text may depend on the strings in another way."""

    def look_for(self, text: str) -> None:
        """Note a text. The white space at its ends may be what the template put around a string."""
        self.looked_for.add(text.strip() or text)


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
        self.watch.look_for(text)
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
            self.watch.look_for(text)
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


def may_hold_watched(value: Any) -> bool:
    """Return whether a watched string may be in the value, or is it. What is in an iterator is not known."""
    from jinja2 import Undefined

    if isinstance(value, Mapping):
        return any(map(may_hold_watched, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple)):
        return any(map(may_hold_watched, value))
    return isinstance(value, Watched) or not isinstance(value, (str, int, float, range, Undefined, type(None)))
