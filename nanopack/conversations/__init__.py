"""Records and files in, checked conversations out, in the order in which a rank reads them.

source.py                    the interface of a data set
data_sets.py                 open files, lists and data sets
files.py, random_access.py   read record i of files of JSON, Parquet and Arrow (json_array.py, arrow.py)
keys.py                      the table of keys, and what each does
records.py, tokens.py        check a record of any accepted shape -> Conversation
order.py                     which conversation a shard (of a rank, or a row) reads when
"""

from nanopack.conversations.files import Files
from nanopack.conversations.order import Shard, permute
from nanopack.conversations.records import (
    Conversation,
    Conversations,
    Dataset,
    Message,
    Part,
    Tokens,
    check,
    open_conversations,
)
from nanopack.conversations.source import Source
from nanopack.errors import ConversationError

__all__ = [
    "Conversation",
    "ConversationError",
    "Conversations",
    "Dataset",
    "Files",
    "Message",
    "Part",
    "Shard",
    "Source",
    "Tokens",
    "check",
    "open_conversations",
    "permute",
]
