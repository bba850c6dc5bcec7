"""Break a class on purpose: change its source, or take one of its calls away; and find the schedule that shows it.

source of a module   ->   orders(), Without   ->   class_from(): the class, mutated   ->   first_fault()
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from actors import Fault


def class_from(source: str | ast.Module, name: str) -> Any:
    """Return the class of that name in the source of a module."""
    namespace: dict[str, Any] = {"__name__": "mutant"}
    exec(compile(source, "mutant", "exec"), namespace)
    return namespace[name]


def first_fault(kind: str, run: Callable[[int], object], schedules: int) -> str | None:
    """Return the first fault of the kind that `run` finds on a schedule, each of which ends with its first fault."""
    for seed in range(schedules):
        try:
            run(seed)
        except Fault as fault:
            if kind in str(fault):
                return str(fault)
    return None


def orders(tree: ast.Module, name: str) -> list[ast.Call]:
    """Return the calls of a class that wait, record, synchronize or query."""
    [found] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    names = ("wait", "record", "synchronize", "query")
    calls = [node for node in ast.walk(found) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in names]


class Without(ast.NodeTransformer):
    """Takes one call away: a statement becomes `pass`, a condition True."""

    def __init__(self, call: ast.Call) -> None:
        self.call = call

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.copy_location(ast.Pass(), node) if node.value is self.call else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        return ast.copy_location(ast.Constant(True), node) if node is self.call else self.generic_visit(node)
