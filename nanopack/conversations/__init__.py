"""Records and files in, checked conversations out, in the order in which a rank reads them.

source.py                    the interface of a data set
data_sets.py                 open files, lists and data sets
files.py, random_access.py   read record i of files of JSON, Parquet and Arrow (json_array.py, arrow.py)
keys.py                      the table of keys, and what each does
records.py, tokens.py        check a record of any accepted shape -> Conversation
order.py                     which conversation a rank (or row) reads when
"""

from nanopack.conversations.files import Files
from nanopack.conversations.order import Share, permute
from nanopack.conversations.records import Conversation, Message, Part, Source, Tokens, check, open_conversations
from nanopack.errors import ConversationError

__all__ = [
    "Conversation",
    "ConversationError",
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
