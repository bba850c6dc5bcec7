"""Promises of template="hf" where a chat template writes the date."""

from __future__ import annotations

import json
import pickle
from datetime import datetime

import pytest

from nanopack import Loader
from nanopack.conversations.records import check
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from hf_chats import DATED, A, U, render, shown
from tiny_hf import PLAIN, make_tokenizer


def at(day: str) -> object:
    tokenizer = load_tokenizer(make_tokenizer(DATED))
    return tokenizer.at(f"{day}T23:59:58")


def batches(loader: Loader, count: int) -> list[list[int]]:
    return [next(loader).inputs.flatten().tolist() for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_a_run_goes_on_with_the_date_that_it_began_with(packing, workers):
    chats = [[U, {**A, "content": "x" * (number % 17)}] for number in range(40)]
    how = {"batch_size": 2, "seq_len": 48, "template": "hf", "num_workers": workers, "packing": packing}
    with Loader(chats, at("2025-12-09"), **how) as loader:
        batches(loader, 3)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = batches(loader, 6)
        assert "09 Dec 2025" in loader.tokenizer.decode(expected[0] + expected[1])
    with Loader(chats, at("2025-12-10"), **how) as loader:
        loader.load_state_dict(state)
        assert batches(loader, 6) == expected
        assert loader.state_dict()["fingerprint"] == state["fingerprint"]


def test_a_date_is_fixed_when_the_tokenizer_is_loaded(monkeypatch):
    import transformers.utils.chat_template_utils as of_transformers

    tokenizer = load_tokenizer(make_tokenizer(DATED))
    renderer, before = Renderer(tokenizer, "hf"), Renderer(tokenizer, "hf")(check([U, A])).ids.tolist()

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2099, 1, 1)

    monkeypatch.setattr(of_transformers, "datetime", Tomorrow)
    for again in (renderer, Renderer(pickle.loads(pickle.dumps(tokenizer)), "hf")):
        assert again(check([U, A])).ids.tolist() == before


def test_the_date_is_part_of_the_fingerprint_and_other_templates_have_none():
    days = [at(day).fingerprint() for day in ("2025-12-09", "2025-12-09", "2025-12-10")]
    assert days[0] == days[1] != days[2]
    assert load_tokenizer(make_tokenizer(PLAIN)).clock is None


def test_a_refused_state_leaves_the_date_as_it_is():
    how = {"batch_size": 1, "seq_len": 48, "template": "hf", "num_workers": 0}
    with Loader([[U, A]] * 9, at("2025-12-09"), **how) as loader:
        state = loader.state_dict()
    with Loader([[U, A]] * 8, at("2025-12-10"), **how) as loader:
        with pytest.raises(ValueError, match="conversations were 9, are 8"):
            loader.load_state_dict(state)
        assert "10 Dec 2025" in loader.tokenizer.decode(next(loader).inputs[0].tolist())


def test_a_date_whose_format_is_computed_is_refused():
    computed = "{% set f = '%d' + '%m' %}{{ strftime_now(f) }}" + PLAIN
    with pytest.raises(ValueError, match="its chat template computes the format of the date that it writes"):
        Renderer(load_tokenizer(make_tokenizer(computed)), "hf")


@pytest.mark.parametrize(
    "written", ["strftime_now('%d %b %Y')", "strftime_now ( '%d %b %Y' )", 'strftime_now\n("%d %b %Y")']
)
def test_the_date_of_the_run_is_written_however_the_call_is_spaced(written):
    dated = "{% if strftime_now is defined %}{{ " + written + " }}{% endif %}" + PLAIN
    tokenizer = load_tokenizer(make_tokenizer(dated)).at("2025-12-09T23:59:58")
    renderer = Renderer(tokenizer, "hf")
    assert tokenizer.decode(renderer(check([U, A])).ids.tolist()).startswith("09 Dec 2025")


@pytest.mark.parametrize("call", ["{% set now = strftime_now %}{{ now('%Y') }}", "{{ strftime_now | string }}"])
def test_a_clock_by_another_name_is_refused(call):
    with pytest.raises(ValueError, match="or calls strftime_now by another name"):
        Renderer(load_tokenizer(make_tokenizer(call + PLAIN)), "hf")


def test_a_template_that_draws_at_random_is_refused():
    with pytest.raises(ValueError, match="its chat template draws at random"):
        Renderer(load_tokenizer(make_tokenizer("{{ ['Hi', 'Hello'] | random }}" + PLAIN)), "hf")


def test_a_date_that_a_record_gives_is_written():
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}"
    said = shown(render(dated + PLAIN, [U, A], chat_template_kwargs={"date_string": "26 Jul 2024"}))
    assert said.startswith("26 Jul 2024<|im_start|>")
