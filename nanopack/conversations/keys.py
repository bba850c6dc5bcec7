"""The keys of records, messages and parts: what each does, and which are known to do nothing.

    RECORD, MESSAGE, PART: key -> kind   ->   check()      reads what matters and names what it does not know
                                              Renderer     refuses what its template cannot write

This table is the only one: a key that is not in it is unknown. Unknown keys are named once in the log and counted in
the ledger. null, NaN, "", [] and {} count as absent under every key but those of kind READ and MASK.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

READ = "read"  # the conversation itself, and its weight
MASK = "mask"  # which of the input_ids stay, and which are in the loss
SYSTEM = "system"  # the text of a first system message
TEMPLATE = "template"  # goes to the chat template with template="hf"; refused elsewhere
IN_LOSS = "in loss"  # true or 1: as the template says; false or 0: nothing of the message is in the loss
NOT_IN_LOSS = "not in loss"  # the reverse
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
    (MASK, "labels loss_mask assistant_masks assistant_mask completion_mask response_mask attention_mask"),
    (MASK, "position_ids seq_lengths"),
    (SYSTEM, "system system_prompt"),
    (TEMPLATE, "tools chat_template_kwargs"),
    # the role whose messages are not in the loss (NeMo)
    (NOT_IN_LOSS, "mask"),
    (REFUSED, "functions images image videos video audios audio documents"),
    (REFUSED, "train training trainable masked loss_weight loss_weights sample_weight token_weights"),
    (REFUSED, "prompt_mask action_mask label_mask"),
)

MESSAGE = _table(
    (HARMLESS, _NOTES),
    (HARMLESS, "end_turn recipient_id"),
    (READ, "role content from value"),
    (IN_LOSS, "weight train training trainable loss"),
    (NOT_IN_LOSS, "masked"),
    (TEMPLATE, "tool_calls function_call tools functions tool_plan tool_responses tool_results"),
    (TEMPLATE, "reasoning_content reasoning reasoning_details thinking thoughts thought refusal citations"),
    (TEMPLATE, "images image videos video audios audio documents prefix"),
    (PASSED, "name tool_call_id"),
    # of these one cannot say what true means, or they are about characters
    (REFUSED, "mask loss_mask loss_scale loss_weight train_detail training_detail"),
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


def is_absent(value: object) -> bool:
    """Return whether the value of a key says nothing: null, NaN, "", [] or {}, also within JSON text."""
    if isinstance(value, str):
        return not value or value.strip() in EMPTY_JSON
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, (list, tuple, Mapping)) and not value)
