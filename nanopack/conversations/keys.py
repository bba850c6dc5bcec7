"""The keys of records, messages and parts: what each does, and which are known to do nothing.

    RECORD, MESSAGE, PART: key -> kind   ->   check()      reads what matters and names what it does not know
                                              Renderer     refuses what its template cannot write

This table is the only one: a key that is not in it is unknown. Unknown keys are named once in the log and counted in
the ledger. null, NaN, "", [] and {} count as absent under every key but those of kind READ and MASK.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

READ = "read"  # the conversation itself, and its weight
MASK = "mask"  # which of the input_ids stay, and which are in the loss
SYSTEM = "system"  # the text of a first system message
TEMPLATE = "template"  # goes to the chat template with template="hf"; refused elsewhere
IN_LOSS = "in loss"  # true or 1: as the template says; false or 0: nothing of the message is in the loss
NOT_IN_LOSS = "not in loss"  # the reverse
PASSED = "passed"  # goes to the chat template with template="hf"; left out elsewhere, where nothing is lost by it
REFUSED = "refused"  # nothing here can honour it
HARMLESS = "harmless"  # says nothing that belongs into a batch

_NOTES = (
    "id idx index uuid uid hash key source sources origin dataset dataset_name subset split category categories topic "
    "topics domain language lang locale tags title url link license license_name score scores quality rating "
    "model model_name model_id created created_at updated_at timestamp timestamps time date version revision comment "
    "comments metadata meta info user_id conversation_id conversation_hash thread_id chat_id session_id prompt_id "
    "message_id parent_id parent_message_id position usage finish_reason stop_reason logprobs object views avatarUrl "
    "avatar skip_prompt_formatting __index_level_0__ __key__ __url__"
).split()


def _table(*groups: tuple[str, Iterable[str]]) -> Mapping[str, str]:
    return {key: kind for kind, keys in groups for key in keys}


RECORD = _table(
    (HARMLESS, _NOTES),
    (HARMLESS, "num_turns turns num_tokens length token_count token_type_ids special_tokens_mask".split()),
    (HARMLESS, "overflow_to_sample_mapping parallel_tool_calls".split()),
    (READ, "messages conversations text input_ids prompt completion instruction input output history weight".split()),
    (MASK, "labels loss_mask assistant_masks completion_mask attention_mask position_ids seq_lengths".split()),
    (SYSTEM, "system system_prompt".split()),
    (TEMPLATE, "tools chat_template_kwargs".split()),
    # role whose messages are not in the loss (NeMo)
    (NOT_IN_LOSS, ["mask"]),
    (REFUSED, "functions images image videos video audios audio documents".split()),
)

MESSAGE = _table(
    (HARMLESS, _NOTES),
    (HARMLESS, "annotations end_turn recipient_id token_count num_tokens".split()),
    (READ, "role content from value".split()),
    (IN_LOSS, "weight train training trainable loss".split()),
    (NOT_IN_LOSS, ["masked"]),
    (TEMPLATE, "tool_calls function_call tools functions tool_plan tool_responses tool_results".split()),
    (TEMPLATE, "reasoning_content reasoning reasoning_details thinking thoughts thought refusal citations".split()),
    (TEMPLATE, "images image videos video audios audio documents prefix".split()),
    (PASSED, "name tool_call_id".split()),
    # of these one cannot say what true means, or they are about characters
    (REFUSED, "mask loss_mask loss_scale loss_weight train_detail training_detail".split()),
)

PART = _table(
    (HARMLESS, _NOTES),
    (HARMLESS, "annotations cache_control".split()),
    (READ, "type text".split()),
    (REFUSED, "image image_url images audio input_audio video file document source_url thinking reasoning".split()),
    (REFUSED, "weight train training trainable loss masked mask loss_mask".split()),
)
