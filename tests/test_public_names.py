"""The public face: names that import, the signature of Loader, and a docstring for each."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing

import pytest

import nanopack
from nanopack import config, packing

NAMES = {
    *("Batch", "BestFit", "BestFitCrop", "BestFitPad", "ConversationError", "EncoderError", "Explanation", "Flat"),
    *("Loader", "Mixture", "ModelSizes", "Pad", "Piece", "ProducerError", "StorageError", "Stream", "Template", "Turn"),
    *("merge_states", "mixture", "verify"),
}

FACES = {
    "nanopack.reference": ["batches"],
    "nanopack.tokenizers": ["from_ranks", "load_tokenizer", "TokenizerLike"],
    "nanopack.conversations": ["ConversationError", "Conversations", "Dataset", "open_conversations"],
    "nanopack.packing": ["Packing", "PackingName", "as_packing", "simulate", "Packed"],
    "nanopack.render": ["Renderer", "Template", "TemplateError", "Turn"],
    "nanopack.attention": ["document_mask", "document_mask_mod"],
    "nanopack.verify": ["compare", "first_difference", "Verification"],
    "nanopack.ledger": ["Ledger", "LedgerReport"],
    "nanopack.stats": ["StatsReport"],
    "nanopack.adapters.nanochat": ["Progress", "base_loader", "mid_loader", "sft_loader"],
}

# The arguments of Loader after the star, in order, with their defaults.
BATCHES = dict(
    packing="best_fit", template="nanochat", first_assistant="keep", turns="all", loss="assistant", loss_weights=None,
    boundary_loss=True, ignore_index=-100, max_document_tokens=None, extras=(), max_pieces=None, seed=None,
    epochs=None, rank=None, world_size=None, shard="rank", document_align=1, balance=None, balance_window=None,
    balance_across=False,
)  # fmt: skip
MAKING = dict(
    device=None, executor=None, encoder=None, num_workers=1, prefetch=4, static=False, resident=False, on_error="raise",
    process_group=None, start_method=None, cache=None,
)  # fmt: skip


def test_every_public_name_is_exported_and_no_other():
    assert set(nanopack.__all__) == NAMES


@pytest.mark.parametrize("module", list(FACES))
def test_the_names_that_are_reached_through_a_folder_import(module):
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in FACES[module])


@pytest.mark.parametrize("name", [*sorted(NAMES), *(f"packing.{name}" for name in ("Packing", "Packed", "simulate"))])
def test_every_public_name_has_a_docstring_and_so_have_its_methods(name):
    found = getattr(packing, name.removeprefix("packing."), None) if "." in name else getattr(nanopack, name)
    # a dataclass without one gets its signature instead
    assert found.__doc__ and not found.__doc__.startswith(f"{found.__name__}(")
    if inspect.isclass(found):
        methods = {name: method for name, method in vars(found).items() if inspect.isfunction(method)}
        undocumented = [name for name, method in methods.items() if not name.startswith("_") and not method.__doc__]
        assert not undocumented


def test_the_signature_of_the_loader_is_what_the_batches_are_and_then_how_they_are_made():
    given = list(inspect.signature(nanopack.Loader).parameters.values())
    named = [p for p in given if p.kind == p.KEYWORD_ONLY]
    first = [(p.name, p.default) for p in given if p.kind == p.POSITIONAL_OR_KEYWORD]
    empty = inspect.Parameter.empty
    assert first == [("conversations", empty), ("tokenizer", None), ("batch_size", 32), ("seq_len", 2048)]
    assert [(p.name, p.default) for p in named] == [*BATCHES.items(), *MAKING.items()]
    assert len(given) == len(first) + len(named)


def test_what_the_batches_are_is_what_a_config_holds_and_the_reference_takes():
    held = {field.name for field in dataclasses.fields(config.LoaderConfig)}
    assert held == {"batch_size", "seq_len", *BATCHES, "on_error"}
    taken = inspect.signature(nanopack.reference.batches).parameters
    assert [*taken] == ["conversations", "tokenizer", "batch_size", "seq_len", *BATCHES, "on_error"]


def test_the_docstring_explains_every_argument_in_the_order_of_the_signature_below_the_two_headings():
    doc = inspect.getdoc(nanopack.Loader)
    first, batches, making = re.split(r"\nWhat the batches are: part of.*\n|\nHow they are made: free.*\n", doc)

    def explained(text):
        return [name for names in re.findall(r"^    ([a-z][a-z_, ]*): ", text, re.M) for name in names.split(", ")]

    assert explained(first) == ["conversations", "tokenizer", "batch_size", "seq_len"]
    assert explained(batches) == [*BATCHES]
    assert explained(making.split("Raises:")[0]) == [*MAKING]


def test_every_choice_of_the_loader_is_a_literal():
    hints = typing.get_type_hints(config.LoaderConfig)
    for name in ("template", "turns", "loss", "loss_weights", "shard", "on_error"):
        assert any(typing.get_origin(hint) is typing.Literal for hint in (hints[name], *typing.get_args(hints[name])))


def test_a_function_that_shadows_its_module_says_so():
    assert callable(nanopack.mixture) and callable(nanopack.verify)
    assert "shadow" in nanopack.__doc__
    # what it says of the module's other names
    from nanopack.verify import compare

    assert compare.__module__ == "nanopack.verify"


def test_the_signature_has_the_headings_of_the_docstring():
    source = textwrap.dedent(inspect.getsource(nanopack.Loader.__init__))
    comments = [line.strip() for line in source.splitlines() if line.strip().startswith("#")][:2]
    assert comments == [
        "# what the batches are: part of a checkpoint's fingerprint",
        "# how they are made: free to change between runs",
    ]
    [function] = ast.parse(source).body
    named = {argument.arg: argument.lineno for argument in function.args.kwonlyargs}
    second = source[: source.index(comments[1])].count("\n") + 1
    assert [name for name, line in named.items() if line < second] == [*BATCHES]
