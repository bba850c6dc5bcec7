"""Run a chat template on strings that watch what it does with them.

    marked messages   ->   Watcher.watch()   ->   which texts it looked for in them; None where it looked otherwise
                           hf_watched.py has the strings

A template that only writes its strings, strips them and looks for texts in them that are not there does the same with
all other strings without these texts. So its text for one conversation is that of every other of the same shape. Not
all that is done with a string asks its methods: Jinja's filters, tests, calls and operators are watched here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

from nanopack.render.hf_watched import Watch, Watched, joined, may_hold_watched

# What these filters do with a string, its methods see; or they do nothing with the strings in a container.
_SEEN = {"trim", "string", "default", "d", "replace"}
_OF_CONTAINERS = {"length", "count", "list", "first", "last", "reverse", "selectattr", "rejectattr", "items"} | _SEEN
# Tests that tell of a string that it is one, or compare it by its methods. "in" is watched apart.
_SEEN_TESTS = {"string", "defined", "undefined", "none", "mapping", "number", "integer", "float", "boolean", "callable"}
_SEEN_TESTS |= {"true", "false", "iterable", "sequence", "in", "eq", "==", "equalto", "ne", "!=", "lower", "upper"}
_SEEN_TESTS |= {"lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge", ">="}

# Arguments that Jinja gives to each call in a loop or block.
_OF_JINJA = {"_loop_vars", "_block_vars"}
# The name of `%` in a template that is watched.
_MODULO = "nanopack_modulo"


def compiler() -> Callable[[str], Any] | None:
    """Return the function by which transformers compiles chat templates, without its cache; None if it has none."""
    import transformers.utils.chat_template_utils as of_transformers

    cached: Any = getattr(of_transformers, "_compile_jinja_template", None)
    found: Callable[[str], Any] | None = getattr(cached, "__wrapped__", None)
    return found


class Watcher:
    """A chat template of its own, whose every way to look into a string is watched."""

    def __init__(self, template: Any, source: str) -> None:
        """`template` is the template as transformers compiles it, for this alone; `source` is its text."""
        self._watch = Watch()
        environment = template.environment
        environment.filters[_MODULO] = operator.mod
        # What Jinja computes as it compiles is not watched.
        environment.optimized = False
        tree = environment.parse(source)
        self._may = _may_be_watched(tree)
        self._template = template = environment.from_string(_with_calls(environment, tree))
        environment.concat = joined
        module = template.root_render_func.__globals__
        module["str_join"] = module["markup_join"] = lambda parts: joined(map(str, parts))
        for name, filtering in list(environment.filters.items()):
            environment.filters[name] = self._watched_filter(name, filtering)
        for name in ("iterable", "sequence"):
            environment.tests[name] = _or_watched(environment.tests[name])
        environment.tests["in"] = self._is_in
        for name, test in list(environment.tests.items()):
            if name not in _SEEN_TESTS:
                environment.tests[name] = self._watched_test(test)
        environment.call = self._watched_call(environment.call)

    def watch(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> tuple[str, set[str]] | None:
        """Return the text, and the texts that the contents must not hold; None where it depends on them otherwise."""
        if not self._may:
            return None
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
        from jinja2.nodes import EvalContext
        from jinja2.runtime import Context

        # jinja2.Environment and those two are given to filters that ask for them
        own = (EvalContext, Context, type(self._template.environment))

        @functools.wraps(filtering)
        def filtered(*arguments: Any, **named: Any) -> Any:
            values = [value for value in (*arguments, *named.values()) if not isinstance(value, own)]
            # Only of its first argument does a filter ask the methods; `default` gives back the other as it is.
            asked = values if name not in _SEEN else () if name in ("default", "d") else values[1:]
            if any(isinstance(value, Watched) for value in asked):
                self._watch.depends = True
            if name not in _OF_CONTAINERS and any(map(may_hold_watched, values)):
                self._watch.depends = True
            found = filtering(*arguments, **named)
            # what is safe as HTML escapes all that it meets
            self._watch.depends |= hasattr(found, "__html__")
            return found

        return filtered

    def _watched_test(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def tested(*arguments: Any) -> Any:
            self._watch.depends |= any(isinstance(value, Watched) for value in arguments)
            return test(*arguments)

        return tested

    def _watched_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(context: Any, what: Any, *arguments: Any, **named: Any) -> Any:
            # A string's method, such as join or format, writes what it is given into a string that is not watched.
            # So does a function; macros, classes and methods of others keep it.
            own = getattr(what, "__self__", None)
            if isinstance(what, FunctionType) or (isinstance(own, str) and not isinstance(own, Watched)):
                given = [value for name, value in named.items() if name not in _OF_JINJA]
                self._watch.depends |= any(map(may_hold_watched, [*arguments, *given]))
            return call(context, what, *arguments, **named)

        return called


def _may_be_watched(tree: Any) -> bool:
    """Return whether the template neither escapes what it writes nor compares in a chain with `in`."""
    from jinja2 import nodes

    chains = (node.ops for node in tree.find_all(nodes.Compare) if len(node.ops) > 1)
    return not any(tree.find_all(nodes.EvalContextModifier)) and not any(
        operand.op in ("in", "notin") for operands in chains for operand in operands
    )


def _with_calls(environment: Any, tree: Any) -> Any:
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

    return Transformer().visit(tree).set_environment(environment)


def _or_watched(test: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, *arguments: isinstance(value, Watched) or test(value, *arguments)
