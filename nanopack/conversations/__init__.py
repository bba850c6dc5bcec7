"""Records and files in, checked conversations out, in the order in which a rank reads them.

files.py, random_access.py   read record i of .jsonl, .jsonl.gz and .parquet files
records.py                   check a record of any accepted shape -> Conversation
order.py                     which conversation a rank (or row) reads when
"""

from nanopack.conversations.files import Files
from nanopack.conversations.order import Share, permute
from nanopack.conversations.records import (
    Conversation,
    Conversations,
    Dataset,
    Message,
    Part,
    Source,
    Tokens,
    check,
    open_conversations,
)
from nanopack.errors import ConversationError

__all__ = [
    "Conversation",
    "ConversationError",
    "Conversations",
    "Dataset",
    "Files",
    "Message",
    "Part",
    "Share",
    "Source",
    "Tokens",
    "check",
    "open_conversations",
    "permute",
]
