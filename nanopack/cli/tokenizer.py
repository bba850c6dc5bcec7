"""Find the tokenizer that --tokenizer names.

--tokenizer TEXT   ->   find_tokenizer()   ->   what Loader takes

Hugging Face tokenizers are read from this machine alone. tiktoken fetches the ranks of its encodings once, and keeps
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiktoken

TOKENIZERS = (
    "chat32k, which ships with nanopack; a nanochat tokenizer folder or its tokenizer.pkl; a Hugging Face tokenizer: "
    "its folder, its tokenizer.json, or its name on the hub, if downloaded; a tiktoken encoding such as cl100k_base"
)


def find_tokenizer(text: str) -> Any:
    """Return the tokenizer, or the text where `load_tokenizer` knows it.

    ValueError where there is none of this name here, ImportError where it takes transformers and there is none.
    """
    path = Path(text)
    if text in tiktoken.list_encoding_names():
        return _fetched(text)
    if path.suffix == ".json" and path.is_file():
        return _of_file(path)
    if (path / "tokenizer.json").is_file() and not (path / "tokenizer.pkl").is_file():
        return _of_folder(path)
    if path.exists() or not _may_be_on_the_hub(text):
        return text
    return _downloaded(text)


def _fetched(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    # requests' errors are OSErrors
    except OSError as error:
        raise ValueError(
            f"tokenizer={name!r}: tiktoken could not fetch its ranks ({type(error).__name__}); put them "
            f"into the folder TIKTOKEN_CACHE_DIR, or give {TOKENIZERS}"
        ) from None


def _of_file(path: Path) -> Any:
    if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        return _of_folder(path.parent)
    return _transformers().PreTrainedTokenizerFast(tokenizer_file=str(path))


def _of_folder(folder: Path) -> Any:
    transformers = _transformers()
    if not (folder / "tokenizer_config.json").is_file():
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _downloaded(name: str) -> Any:
    try:
        return _transformers().AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        raise ValueError(
            f"tokenizer={name!r} is neither a file nor a folder, and Hugging Face's cache on this machine does not "
            f"hold it; download it (hf download {name} --include 'tokenizer*'), or give {TOKENIZERS}"
        ) from None


def _may_be_on_the_hub(text: str) -> bool:
    """Return whether this is OWNER/NAME."""
    owner, slash, name = text.partition("/")
    return bool(slash and owner and name) and "/" not in name and owner not in (".", "..", "~")


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ImportError("a Hugging Face tokenizer needs transformers; pip install 'nanopack-gpu[hf]'") from error
    return transformers
