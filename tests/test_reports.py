"""Public bug reports about loaders of chat data, tried here: what the report asks for is in the loss, or it is refused.

A test's name ends in the project and the number of its issue or pull request.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from containers import as_dataset
from shown import BAD, ROW, SMALL, A, U, chatml, refused, shown

import nanopack
from nanopack.conversations.records import check, open_conversations

S = {"role": "system", "content": "S"}
QA = chatml("user Q", "assistant A")
FUNCTION = {"name": "f", "arguments": {"city": "Bonn"}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}]}
RESULT = {"role": "tool", "content": "R"}


def test_only_the_completion_is_in_the_loss_trl_4147() -> None:
    assert shown({"prompt": [S, U], "completion": [A]}) == chatml("system S", "user Q", "assistant A")


def test_a_prompt_and_an_output_are_not_taken_for_a_text_trl_1512() -> None:
    assert "a prompt needs a completion" in refused({"prompt": "Q", "output": "A"})


def test_an_answer_beyond_the_row_is_counted_and_not_trained_on_nothing_trl_3927() -> None:
    records = [{"messages": [U | {"content": "Q" * 99}, A]}]
    with nanopack.Loader(records, SMALL, batch_size=1, seq_len=32, epochs=1, num_workers=0) as loader:
        assert list(loader) == []
        assert loader.ledger()["conversations"]["dropped"] == {"untrained": 1}
        assert loader.ledger()["tokens"]["cut"]["seq_len"] > 0
    with pytest.raises(ValueError, match="nothing to pack"):
        next(nanopack.Loader(records, SMALL, batch_size=1, seq_len=32, num_workers=0))


def test_a_packed_record_is_refused_trl_3699_llama_factory_7318() -> None:
    for key, value in (("seq_lengths", [1, 1]), ("position_ids", [0, 0])):
        assert "packed" in refused({"input_ids": [65, 66], key: value})


def test_every_answer_is_in_the_loss_and_not_the_last_alone_axolotl_1761() -> None:
    assert shown([U, A, U, A]) == chatml("user Q", "assistant A", "user Q", "assistant A")


def test_the_first_token_of_an_answer_and_the_one_that_ends_it_are_in_the_loss_alpaca_lora_306_axolotl_2287() -> None:
    assert shown([U, A]).endswith("[[A<|im_end|>]]\n")
    assert shown([U, A], "nanochat").endswith("[[A<|assistant_end|>]]")


def test_a_part_that_is_not_to_be_learnt_is_refused_axolotl_3592() -> None:
    for flag in ({"train": False}, {"weight": 0}):
        assert "part 0" in refused([U, A | {"content": [{"type": "text", "text": "A", **flag}]}])


def test_a_message_that_is_not_trainable_is_not_in_the_loss_verl_5472_axolotl_1702() -> None:
    for flag in ({"trainable": False}, {"weight": 0}):
        assert shown([U, BAD | flag, U, A]) == chatml("user Q", "!assistant BAD", "user Q", "assistant A")
    assert "loss_mask cannot be honoured" in refused([U, A | {"loss_mask": 0}])


def test_a_loss_mask_of_turns_is_refused_llama_factory_9630() -> None:
    assert "loss_mask is about input_ids" in refused({"conversations": [U, BAD, U, A], "loss_mask": [0, 0, 0, 1]})


def test_what_came_before_is_kept_with_its_system_llama_factory_4683_unsloth_11053() -> None:
    record = {"instruction": "Q", "input": "", "output": "A", "system": "S", "history": [["H", "B"], ["I", "C"]]}
    turns = ["user H", "assistant B", "user I", "assistant C", "user Q", "assistant A"]
    assert shown(record) == chatml("system S", *turns)


def test_a_call_is_in_the_loss_and_what_is_observed_is_not_llama_factory_5866() -> None:
    turns = [("human", "Q"), ("function_call", "C"), ("observation", "R"), ("gpt", "A")]
    record = {"conversations": [{"from": name, "value": text} for name, text in turns]}
    assert shown(record) == chatml("user Q", "assistant C", "tool R", "assistant A")


def test_a_system_and_every_turn_are_kept_automodel_3143_angelslim_345() -> None:
    turns = [("system", "S"), ("human", "Q"), ("gpt", "A"), ("human", "T"), ("gpt", "B")]
    record = {"conversations": [{"from": name, "value": text} for name, text in turns]}
    assert shown(record) == chatml("system S", "user Q", "assistant A", "user T", "assistant B")


def test_pads_on_the_left_whose_id_is_0_are_not_packed_automodel_3704() -> None:
    padded = {"input_ids": [0, 0, 65, 66], "attention_mask": [0, 0, 1, 1], "labels": [-100, -100, -100, 66]}
    assert shown(padded) == "A[[B]]"


def test_an_answer_that_is_not_desired_is_refused_ms_swift_4535_liquid_32() -> None:
    for key in ("label", "kto_tag"):
        assert f"{key} is False" in refused({"messages": [U, A], key: False})
        assert shown({"messages": [U, A], key: True}) == QA


def test_messages_beside_a_prompt_and_completion_are_refused_prime_rl_2074() -> None:
    assert "messages and prompt; remove all" in refused({"messages": [U, A], "prompt": "T", "completion": "B"})


def test_a_cut_answer_is_counted_mistral_common_332() -> None:
    record = {"messages": [U, A | {"content": "A" * 50}]}
    with nanopack.Loader([record], SMALL, **{**ROW, "max_document_tokens": 30}) as loader:
        assert next(loader).num_tokens == 30
        assert loader.ledger()["tokens"]["cut"] == {"max_document_tokens": loader.ledger()["tokens"]["read"] - 30}


def test_reasoning_and_calls_are_refused_where_they_would_be_lost_minimind_737_axolotl_3824_cookbook_394() -> None:
    for template in ("chatml", "nanochat"):
        assert "message 1: it has reasoning_content" in refused([U, A | {"reasoning_content": "R"}], template)
        assert "message 1: it has tool_calls" in refused([U, CALL, RESULT, A], template)


def test_roles_of_ms_swift_are_refused_and_not_left_out_ms_swift_9427() -> None:
    call = {"role": "tool_call", "name": "f", "arguments": {}, "content": "{}"}
    assert "message 1: role is 'tool_call'" in refused([U, call, {"role": "tool_response", "content": "R"}, A])


# With a tokenizer's own chat template


def stock(name: str) -> Any:
    pytest.importorskip("transformers")
    from stock_templates import folder, make_stock

    if folder() is None:
        pytest.skip("needs trl, whose chat templates these are: pip install trl")
    return nanopack.tokenizers.load_tokenizer(make_stock(name))


def in_loss(tokenizer: Any, record: Any) -> str:
    assert nanopack.verify([record], tokenizer, template="hf", batch_size=1, seq_len=512, num_workers=0)
    document = nanopack.render.Renderer(tokenizer, "hf")(check(record))
    return str(tokenizer.decode(document.ids[document.mask]))


@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_the_token_that_ends_a_turn_is_in_the_loss_axolotl_3754(name: str) -> None:
    assert in_loss(stock(name), [U, A, U, A]).count("A<end_of_turn>") == 2


def test_an_empty_list_of_calls_is_no_call_vllm_13978() -> None:
    for name in ("llama3_1", "deepseekv3", "qwen3"):
        tokenizer = stock(name)
        assert in_loss(tokenizer, [U, A | {"tool_calls": []}]) == in_loss(tokenizer, [U, A])


def test_a_call_that_is_not_to_be_learnt_is_shown_and_not_in_the_loss_ms_swift_9263_art_527() -> None:
    tokenizer = stock("qwen3_training")
    assert "Bonn" in in_loss(tokenizer, [U, CALL, RESULT, A])
    record = [U, CALL | {"weight": 0}, RESULT, A]
    document = nanopack.render.Renderer(tokenizer, "hf")(check(record))
    assert "Bonn" not in in_loss(tokenizer, record) and "Bonn" in tokenizer.decode(document.ids)


def test_reasoning_beside_a_call_is_kept_automodel_2348() -> None:
    said = in_loss(stock("qwen3_training"), [U, CALL | {"reasoning_content": "WHY"}, RESULT, A])
    assert "WHY" in said and "Bonn" in said and "R" not in said.replace("WHY", "")


def test_thoughts_that_a_template_drops_are_counted_llama_factory_9288_cookbook_386() -> None:
    record = {"messages": [U, A | {"reasoning_content": "EARLY"}, U, A | {"reasoning_content": "LATE"}]}
    with nanopack.Loader([record], stock("qwen3"), **{**ROW, "template": "hf", "packing": "best_fit_pad"}) as loader:
        list(loader)
        [(key, count)] = loader.ledger()["ignored_keys"].items()
        assert "thought" in key and count == 1


def test_a_thought_in_the_last_answer_is_in_the_loss_or_refused_open_r1_585() -> None:
    for name in ("deepseek_r1_distill", "deepseek_r1_distill_training", "qwen3"):
        try:
            assert "WHY" in in_loss(stock(name), [U, A | {"content": "<think>\nWHY\n</think>\n\nA"}])
        except nanopack.ConversationError as error:
            assert "is lost" in str(error) or "begins it in another way" in str(error)


def test_white_space_that_merges_with_the_header_leaves_the_question_out_skyrl_1611() -> None:
    for name in ("qwen2_5", "qwen3_training", "llama3"):
        said = in_loss(stock(name), [U, A | {"content": "\n\n A"}])
        assert "A" in said and "Q" not in said and "assistant" not in said


@pytest.mark.parametrize("blanks", [" ", "  ", "\n", " \n ", "\n\n  "])
def test_white_space_at_the_end_of_an_answer_is_in_the_loss_where_the_template_keeps_it(blanks: str) -> None:
    for name in ("qwen2_5", "qwen3_training", "gptoss", "deepseekv3", "phi3", "lfm2"):
        tokenizer = stock(name)
        for content in (f"A{blanks}", f"{blanks}A{blanks}"):
            assert f"A{blanks}<" in in_loss(tokenizer, [U, A | {"content": content}, U, A | {"content": content}])


def test_tools_from_arrow_are_as_they_were_given_ms_swift_10125() -> None:
    tools = [
        [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": properties}}}]
        for properties in ({"a": {"type": "string"}}, {"b": {"type": "integer", "minimum": 1}})
    ]
    records = [{"messages": [U, A], "tools": one} for one in tools]
    source = open_conversations(as_dataset(records, Path()))
    tokenizer = stock("qwen3_training")
    render = nanopack.render.Renderer(tokenizer, "hf")
    for place, record in enumerate(records):
        text = tokenizer.decode(render(check(source[place])).ids)
        assert text == tokenizer.decode(render(check(record)).ids) and "null" not in text


def test_mistrals_brackets_leave_the_answers_in_the_loss_axolotl_2089_unsloth_1290() -> None:
    pytest.importorskip("transformers")
    from tiny_hf import make_tokenizer

    inst = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = nanopack.tokenizers.load_tokenizer(make_tokenizer(inst))
    assert in_loss(tokenizer, [U, A, U, A]) in ("A<|im_end|>A<|im_end|>", " A<|im_end|> A<|im_end|>")
