"""The file of the bundled tokenizer, and its split pattern, written down again."""

from importlib import resources

RANKS_FILE = str(resources.files("nanopack") / "data" / "chat32k.tiktoken")
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
