"""What `pip install` puts on a user's machine: exactly the tracked files of the package, from wheel and sdist alike."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# setuptools itself, without pip and without a network
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def built(kind: str, tree: Path, into: Path) -> Path:
    into.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, f"build_{kind}", into], cwd=tree, check=True, capture_output=True)
    [file] = into.iterdir()
    return file


def files_of(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, which says which files belong to the package")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def tree(tracked, tmp_path_factory) -> Path:
    """A copy without build/ and whatever else lies around in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


def test_a_wheel_holds_the_packages_tracked_files_and_nothing_else(tracked, tree, tmp_path):
    expected = {name for name in tracked if name.startswith("nanopack/")}
    expected |= {f"nanopack/{name}" for name in tracked if name.startswith("kernels/")}
    assert {"nanopack/py.typed", "nanopack/kernels/pack.py", "nanopack/data/chat32k.tiktoken"} <= expected
    assert files_of(built("wheel", tree, tmp_path / "wheel")) == expected
    # what is built from the sources on PyPI is the same
    with tarfile.open(built("sdist", tree, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.glob("nanopack_gpu-*")
    assert files_of(built("wheel", unpacked, tmp_path / "again")) == expected


def test_the_other_distribution_of_that_import_name_is_named_with_the_remedy(tree, tmp_path):
    package = tmp_path / "nanopack"
    shutil.copytree(tree / "nanopack", package)
    shutil.copytree(tree / "kernels", package / "kernels")
    importing = [sys.executable, "-c", "import nanopack; print(nanopack.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    sound = subprocess.run(importing, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert sound.stdout.strip() == str(package / "__init__.py")
    # what the tools for nanopore sequencing install
    (package / "version.py").write_text('__version__ = "1.1.0"')
    refused = subprocess.run(importing, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "ImportError" in refused.stderr
    assert "pip uninstall nanopack, then pip install --force-reinstall --no-deps nanopack-gpu" in refused.stderr
