"""The definition: the same batches as the loader's, slowly, in plain Python. Shares no code with the fast path.

files.py       files -> records, read whole
records.py     records of any shape -> one; messages.py, tokens.py, values.py are its parts
documents.py   records -> tokens; chat.py, chat_writer.py: by a tokenizer's own chat template
order.py       which conversation is read when
packing.py     documents -> rows
batches.py     rows -> batches; arguments.py checks what was asked for
"""

from nanopack.reference.batches import batches

__all__ = ["batches"]
