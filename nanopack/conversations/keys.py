"""The keys of records, messages and parts: what each does, and which are known to do nothing.

    RECORD, MESSAGE, PART: key -> kind   ->   check()      reads what matters and names what it does not know
                                              Renderer     refuses what its template cannot write

This table is the only one: a key that is not in it is unknown. Unknown keys are named once in the log and counted in
the ledger, but lookalikes.py finds those that look like one that matters, and they are refused: `toolCalls`, `cot`.
null, NaN, "", [] and {} count as absent under every key but those of kind READ and MASK.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

READ = "read"  # the conversation itself, and its weight
MASK = "mask"  # which of the input_ids stay, and which are in the loss
PACKED = "packed"  # next to input_ids: refused where it shows several documents; says nothing elsewhere
SYSTEM = "system"  # the text of a first system message
TEMPLATE = "template"  # goes to the chat template with template="hf"; refused elsewhere
IN_LOSS = "in loss"  # true or 1: as the template says; false or 0: nothing of the message is in the loss
NOT_IN_LOSS = "not in loss"  # the reverse
WANTED = "wanted"  # false: the answer is not one to learn, and the record is refused
PASSED = "passed"  # goes to the chat template with template="hf"; left out elsewhere, where nothing is lost by it
REFUSED = "refused"  # nothing here can honour it
HARMLESS = "harmless"  # says nothing that belongs into a batch

SHAPES = ("messages", "conversations", "text", "input_ids", "prompt", "instruction")

_NOTES = """
    id idx index uuid uid hash key source sources origin dataset dataset_name subset split category categories topic
    topics domain language lang locale tags title url link license license_name score scores quality rating model
    model_name model_id created created_at updated_at timestamp timestamps time date version revision comment comments
    metadata meta info user_id conversation_id conversation_hash thread_id chat_id session_id prompt_id message_id
    parent_id parent_message_id position usage finish_reason stop_reason logprobs object views avatarUrl avatar
    skip_prompt_formatting annotations num_tokens token_count __index_level_0__ __key__ __url__
"""


def _table(*groups: tuple[str, str]) -> Mapping[str, str]:
    return {key: kind for kind, names in groups for key in names.split()}


RECORD = _table(
    (HARMLESS, _NOTES),
    (HARMLESS, "num_turns turns length token_type_ids special_tokens_mask overflow_to_sample_mapping"),
    (HARMLESS, "parallel_tool_calls"),
    (READ, "messages conversations text input_ids prompt completion instruction input output history weight"),
    (READ, "context chosen rejected role"),
    (MASK, "labels loss_mask assistant_masks assistant_mask completion_mask response_mask attention_mask"),
    (MASK, "position_ids seq_lengths"),
    (PACKED, "cu_seqlens seq_start_id segment_ids sequence_ids seq_idx doc_ids document_ids"),
    (SYSTEM, "system system_prompt system_message system_instruction"),
    (TEMPLATE, "tools chat_template_kwargs"),
    # the role whose messages are not in the loss (NeMo)
    (NOT_IN_LOSS, "mask"),
    # KTO's and LLaMA-Factory's
    (WANTED, "label kto_tag"),
    (REFUSED, "functions images image videos video audios audio documents"),
    (REFUSED, "train training trainable masked loss_weight loss_weights sample_weight token_weights"),
    (REFUSED, "prompt_mask action_mask label_mask label_ids target_ids decoder_input_ids"),
    # these belong into a message
    (REFUSED, "tool_calls function_call reasoning reasoning_content thinking thought thoughts chain_of_thought cot"),
    # these belong into chat_template_kwargs
    (REFUSED, "enable_thinking reasoning_effort"),
)

MESSAGE = _table(
    (HARMLESS, _NOTES),
    (HARMLESS, "end_turn recipient_id"),
    (READ, "role content from value"),
    (IN_LOSS, "weight train training trainable is_trainable train_on_turn loss"),
    (NOT_IN_LOSS, "masked"),
    (TEMPLATE, "tool_calls tool_call function_call tools functions arguments tool_plan tool_responses tool_results"),
    (TEMPLATE, "function_calls tool_use tool_uses tool_code tool_result tool_output tool_outputs channel"),
    (
        TEMPLATE,
        "reasoning_content reasoning reasoning_details thinking thinking_blocks thoughts thought refusal citations",
    ),
    (TEMPLATE, "chain_of_thought cot images image videos video audios audio documents prefix partial"),
    (PASSED, "name tool_call_id"),
    # of these one cannot say what true means, or they are about characters
    (REFUSED, "mask loss_mask loss_scale loss_weight train_detail training_detail"),
    # Gemini's and AI SDK's content
    (REFUSED, "parts attachments"),
)

PART = _table(
    (HARMLESS, _NOTES),
    (HARMLESS, "cache_control"),
    (READ, "type text"),
    (REFUSED, "image image_url images audio input_audio video file document thinking reasoning"),
    (REFUSED, "weight train training trainable loss masked mask loss_mask"),
)


class Row(dict[str, Any]):
    """A row of a table, with the columns that were read; of `unread` ones nothing is known but their names."""

    unread: tuple[str, ...] = ()


# Of those that may come as JSON text, the texts that hold nothing.
EMPTY_JSON = ("[]", "{}", "null", '""')


def bare(value: Any) -> Any:
    """Return the number that numpy or torch wrap into a scalar, as formatted data sets do; others as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def is_absent(value: Any) -> bool:
    """Return whether the value of a key says nothing: null, NaN, "", [] or {}, also within JSON text."""
    if isinstance(value, str):
        return not value or value.strip() in EMPTY_JSON
    if isinstance(value, Real):
        return bool(value != value)
    if value is None or isinstance(value, (list, tuple, Mapping)):
        return not value
    # an array that pandas made of a list, or what it writes for none
    kind = type(value).__name__
    return kind in ("NAType", "NaTType") or (kind == "ndarray" and value.size == 0)
