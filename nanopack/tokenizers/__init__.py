"""Text in, token ids out.

tokenizer.py        load_tokenizer: whatever the user gives -> one interface; tiktoken
rank_files.py       read tiktoken encodings from rank files and nanochat's pickles
huggingface.py      fast tokenizers of Hugging Face; core.py and added_tokens.py are parts of them
byte_level.py       their byte-level BPE, encoded by tiktoken, from byte_tables.py
splintr.py          encoder="fast"; split_patterns.py rewrites the patterns that it is given
"""

from nanopack.errors import EncoderError
from nanopack.tokenizers.splintr import FastTokenizer, choose_encoder
from nanopack.tokenizers.tokenizer import AnyTokenizer, Tokenizer, TokenizerLike, from_ranks, load_tokenizer

__all__ = [
    "AnyTokenizer",
    "EncoderError",
    "FastTokenizer",
    "Tokenizer",
    "TokenizerLike",
    "choose_encoder",
    "from_ranks",
    "load_tokenizer",
]
