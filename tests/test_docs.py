"""What the documentation shows is what happens: its code runs, its figures are in the results, its tests exist."""

from __future__ import annotations

import functools
import importlib.util
import re
import tempfile
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


def script(name):
    found = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@functools.cache
def ran(block):
    """What a block of code does as a flat script."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(block)
        return forked.run(script, cwd=folder)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_runs_as_a_flat_script(block):
    done = ran(block)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_resumed_runs_of_the_documentation_give_what_they_say():
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "resume.md").read_text("utf-8"), re.DOTALL)
    assert ran(block).stdout == "resumes at step 10 and gives all: True\none rank resumes at step 1\n"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_tables_of_figures_are_what_the_results_say(page):
    written = page.read_text(encoding="utf-8")
    assert script("tables").filled(written) == written


def test_every_test_that_the_faults_name_exists():
    named = re.findall(r"`([\w/]+\.py)`: `(test_\w+)`", (ROOT / "docs" / "faults.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    missing = [(file, test) for file, test in named if f"def {test}(" not in (ROOT / "tests" / file).read_text("utf-8")]
    assert not missing


def test_every_page_is_in_the_navigation_and_every_link_between_pages_leads_somewhere():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.name in navigation
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_opens_with_its_title(page):
    text = page.read_text(encoding="utf-8")
    # after what mkdocs reads, between lines of three dashes
    assert re.match(r"(---\n(\w+: .*\n)+---\n\n)?# ", text), text[:80]


def test_pictures_are_of_what_the_loader_gives():
    batch, balance = script("picture"), script("picture_balance")
    assert batch.PICTURE.read_text(encoding="utf-8") == batch.svg(batch.drawn_batch())
    assert balance.PICTURE.read_text(encoding="utf-8") == balance.svg(balance.works())
