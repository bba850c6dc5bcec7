"""All that runs in the producer process: read, tokenize, pack, fill slots.

reader.py     conversations by index -> documents as token words
shard.py      one shard of the conversations, packed into rows;  placed.py  what is counted of them
producer.py   all shards of a rank -> filled slots; counting.py  how many there will be
feed.py       the producer in the caller's thread;  process.py  in a process of its own
workers.py    more processes that read and tokenize
start.py      how a process is started and gets what it works with;  child.py  what it needs itself
cursors.py    its own positions in the files of the data set
"""

from nanopack.errors import ProducerError
from nanopack.producer.feed import Feed, Inline
from nanopack.producer.process import Process
from nanopack.producer.producer import Producer, Start

__all__ = ["Feed", "Inline", "Process", "Producer", "ProducerError", "Start"]
