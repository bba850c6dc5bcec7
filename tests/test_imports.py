"""The way of the data in the imports: each stage knows those before it, and none after it."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the data to the user. A stage imports only those before it, also through other modules.
ORDER = (
    *("errors", "packing", "conversations", "tokenizers", "render", "config", "ring", "store"),
    *("producer", "upload", "loader", "reference", "adapters", "cli"),
)


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files_of(name: str) -> list[Path]:
    """The files of a folder of nanopack, or of a module at its top."""
    package = ROOT / "nanopack"
    return [*(package / name).rglob("*.py"), *package.glob(f"{name}.py")]


@functools.cache
def graph() -> dict[str, set[str]]:
    """For each folder and module at the top of nanopack, those that it imports anywhere."""
    found = {path.relative_to(ROOT / "nanopack").parts[0] for path in (ROOT / "nanopack").rglob("*.py")}
    names = {name.removesuffix(".py") for name in found} - {"__init__"}
    return {
        name: {
            module.split(".")[1]
            for path in files_of(name)
            for module in imported(path)
            if module.startswith("nanopack.")
        }
        & (names - {name})
        for name in names
    }


def test_imports_form_no_circle():
    assert len([*TopologicalSorter(graph()).static_order()]) == len(graph())


@pytest.mark.parametrize("stage", ORDER)
def test_imports_point_one_way_along_the_data(stage):
    edges = graph()
    reached, waiting = set(), [stage]
    while waiting:
        found = edges[waiting.pop()] - reached
        reached |= found
        waiting += found
    assert reached & {*ORDER} <= {*ORDER[: ORDER.index(stage)]}


def test_packing_knows_neither_tensors_nor_tokens():
    for path in files_of("packing"):
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "tiktoken", "triton"}


@pytest.mark.parametrize("stage", ["ring", "producer"])
def test_what_the_producer_runs_needs_no_torch(stage):
    for path in files_of(stage):
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "triton"}


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - {"__future__", "collections", "typing"}
        assert outside <= {"torch", "triton", "pack", "pack_torch", "gather_torch"}, path


# What the reference and the fast path share: the containers, the encoding of one string, what an error is.
SHARED = {
    "nanopack.batch",
    "nanopack.errors",
    "nanopack.render.templates",
    "nanopack.tokenizers.huggingface",
    "nanopack.tokenizers.tokenizer",
}


def test_the_reference_shares_no_code_with_the_fast_path():
    for path in files_of("reference"):
        modules = {
            node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
        }
        assert {
            m for m in modules if m and m.startswith("nanopack.") and not m.startswith("nanopack.reference")
        } <= SHARED
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # what a template is, and not those that have a name
            if isinstance(node, ast.ImportFrom) and node.module == "nanopack.render.templates":
                assert [alias.name for alias in node.names] == ["Template"]


def test_importing_nanopack_imports_nothing_heavy_besides_torch():
    code = "import json, sys; import nanopack; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    heavy = {"triton", "pyarrow", "transformers", "tokenizers", "datasets", "pandas", "matplotlib", "rich", "splintr"}
    assert not heavy & set(json.loads(done.stdout))


def test_the_kernels_folder_is_not_mistaken_for_a_package_of_that_name():
    done = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "this folder is nanopack.kernels" in done.stderr
