"""The way of the data in the imports: each stage knows those before it, and none behind it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the data to the user. A module imports only what stands before it.
ORDER = [
    "file_bytes",
    "files",
    "conversations",
    "templates",
    "huggingface",
    "encodings",
    "patterns",
    "tokenizers",
    "fast",
    "chat_template",
    "render",
    "order",
    "rows",
    "best_fit",
    "packing",
    "recipe",
    "mixture",
    "signs",
    "ring",
    "failure",
    "reading",
    "workers",
    "ledger",
    "lane",
    "counting",
    "producer",
    "feed",
    "process",
    "device",
    "upload",
    "kernels",
    "executor",
    "delivery",
    "batch",
    "attention",
    "memory",
    "stats",
    "explain",
    "state",
    "ranks",
    "loader",
    "reference_documents",
    "reference_order",
    "reference_packing",
    "reference",
    "verify",
    "adapters",
    "demo",
    "cli",
]
# A folder, not a file.
PACKAGES = {"kernels", "adapters", "bench"}
COMMAND_LINE = {"options", "progress", "totals", "lengths", "page", "picture", "plot", "terminal", "commands", "bench"}


def imported(path: Path, *, at_import: bool = False) -> set[str]:
    """The modules that a file imports, anywhere in it or only when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def stages(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("nanopack.")} & {*ORDER, *COMMAND_LINE}


@pytest.mark.parametrize("stage", [stage for stage in ORDER if stage not in ("kernels", "cli")])
def test_imports_point_one_way_along_the_data(stage):
    before = set(ORDER[: ORDER.index(stage)])
    package = ROOT / "nanopack"
    files = list((package / stage).glob("*.py")) if stage in PACKAGES else [package / f"{stage}.py"]
    assert files
    for path in files:
        assert stages(path) <= before, path


def test_every_module_has_its_place_in_the_order():
    modules = {path.stem for path in (ROOT / "nanopack").glob("*.py")} - {"__init__"}
    assert modules == {*ORDER, *COMMAND_LINE} - PACKAGES


@pytest.mark.parametrize("stage", ["rows", "best_fit", "packing"])
def test_packing_knows_neither_tensors_nor_tokens(stage):
    path = ROOT / "nanopack" / f"{stage}.py"
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "numpy", "tiktoken", "triton"}
    assert stages(path) <= {"rows", "best_fit"}


@pytest.mark.parametrize("stage", ["reading", "ring", "producer", "process"])
def test_what_the_producer_runs_needs_no_torch(stage):
    assert not {name.split(".")[0] for name in imported(ROOT / "nanopack" / f"{stage}.py")} & {"torch", "triton"}


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - {"__future__", "collections", "typing"}
        assert outside <= {"torch", "triton", "pack_torch"}, path


@pytest.mark.parametrize("part", ["reference", "reference_documents", "reference_order", "reference_packing"])
def test_the_reference_shares_no_code_with_the_fast_path(part):
    path = ROOT / "nanopack" / f"{part}.py"
    allowed = {"batch", "tokenizers", "conversations", "templates", "huggingface"}
    assert stages(path) <= allowed | {"reference_documents", "reference_order", "reference_packing"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "nanopack.conversations":
            assert [alias.name for alias in node.names] == ["ConversationError"]
        # what a template is, and not those that have a name
        if isinstance(node, ast.ImportFrom) and node.module == "nanopack.templates":
            assert [alias.name for alias in node.names] == ["Template"]


def test_importing_nanopack_imports_nothing_heavy_beside_torch():
    code = "import json, sys; import nanopack; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    heavy = {"triton", "pyarrow", "transformers", "tokenizers", "datasets", "pandas", "matplotlib", "rich", "splintr"}
    assert not heavy & set(json.loads(done.stdout))


def test_the_kernels_folder_is_not_mistaken_for_a_package_of_that_name():
    done = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "this folder is nanopack.kernels" in done.stderr
