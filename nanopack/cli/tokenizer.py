"""Find the tokenizer that --tokenizer names.

--tokenizer TEXT   ->   find_tokenizer()   ->   what Loader takes

Hugging Face tokenizers are read from this machine alone. tiktoken fetches the ranks of its encodings once, and keeps
them.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from nanopack.conversations.kinds import refuse_other_kinds
from nanopack.conversations.random_access import PlainBytes

BUNDLED = "chat32k"

TOKENIZERS = (
    "chat32k, which ships with nanopack; a nanochat tokenizer folder or its tokenizer.pkl; a Hugging Face tokenizer: "
    "its folder, its tokenizer.json, or its name on the hub, if downloaded; a tiktoken encoding such as cl100k_base"
)
# Any of these is of a Hugging Face tokenizer; without the first it is a slow one.
_FILES = ("tokenizer.json", "tokenizer_config.json", "tekken.json", "vocab.txt", "vocab.json", "*.model")
# transformers makes it fast, and guesses at what its files do not say, how texts are split for instance.
_SLOW = (
    "no tokenizer.json; load it in Python as its makers do, and give the folder that save_pretrained() writes, or the "
    "tokenizer itself to nanopack.Loader"
)
_OFFLINE = {"local_files_only": True, "trust_remote_code": False}


def find_tokenizer(text: str) -> Any:
    """Return the tokenizer, or its name or path where `load_tokenizer` knows it.

    ValueError where there is none of this name here or it cannot be read, ImportError where it takes a package that is
    not installed, OSError where a file cannot be opened.
    """
    if text in tiktoken.list_encoding_names():
        return _fetched(text)
    path = Path(text).expanduser()
    if text in ("", BUNDLED):
        return text
    if not path.exists():
        if _may_be_on_the_hub(text):
            return _downloaded(text)
        raise ValueError(
            f"tokenizer={text!r} is neither a bundled name nor an existing file or folder; give {TOKENIZERS}"
        )
    if path.suffix in (".pkl", ".tiktoken") or (path / "tokenizer.pkl").is_file():
        return str(path)
    folder = path.parent if path.is_file() and any(map(path.match, _FILES)) else path
    if folder.is_dir():
        return _of_folder(folder)
    if path.suffix == ".json":
        fast = _transformers().PreTrainedTokenizerFast
        return _read(path, [path], lambda: fast(tokenizer_file=str(path), name_or_path=str(path)))
    raise ValueError(f"tokenizer={text!r} is neither a .pkl nor a .json file; give {TOKENIZERS}")


def _fetched(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    # requests' errors are OSErrors
    except OSError as error:
        raise ValueError(
            f"tokenizer={name!r}: tiktoken could not fetch its ranks ({type(error).__name__}); put them "
            f"into the folder TIKTOKEN_CACHE_DIR, or give {TOKENIZERS}"
        ) from None


def _of_folder(folder: Path) -> Any:
    fast, config = folder / _FILES[0], folder / _FILES[1]
    if not fast.is_file():
        others = [file.name for pattern in reversed(_FILES) for file in folder.glob(pattern) if file.is_file()]
        if others:
            raise ValueError(f"tokenizer={str(folder)!r} has {others[0]}, but {_SLOW}")
        raise ValueError(
            f"tokenizer={str(folder)!r} is a folder without a tokenizer, such as tokenizer.json or tokenizer.pkl; give "
            f"{TOKENIZERS}"
        )
    transformers = _transformers()
    if not config.is_file():
        alone = transformers.PreTrainedTokenizerFast
        return _read(folder, [fast], lambda: alone.from_pretrained(str(folder), local_files_only=True))
    return _read(folder, [fast, config], lambda: transformers.AutoTokenizer.from_pretrained(str(folder), **_OFFLINE))


def _downloaded(name: str) -> Any:
    auto = _transformers().AutoTokenizer
    # transformers comes with it
    from huggingface_hub import try_to_load_from_cache

    try:
        found = _read(name, [], lambda: auto.from_pretrained(name, **_OFFLINE))
    except OSError:
        raise ValueError(
            f"tokenizer={name!r} is neither a file nor a folder, and Hugging Face's cache on this machine does not "
            f"hold it; download it (hf download {name} --include '*.json' --include '*.jinja' --include '*.model'), "
            f"or give {TOKENIZERS}"
        ) from None
    if not isinstance(try_to_load_from_cache(name, "tokenizer.json"), str):
        raise ValueError(f"tokenizer={name!r} is in Hugging Face's cache, but with {_SLOW}")
    return found


def _read(given: str | Path, files: Sequence[Path], load: Callable[[], Any]) -> Any:
    """Return the tokenizer that `load` makes of the files; where it cannot, raise what is wrong with them."""
    for file in files:
        refuse_other_kinds(str(file), PlainBytes.head(str(file)))
    try:
        return load()
    except OSError:
        raise
    # a broken file may raise anything, in Rust too
    except Exception as error:
        why = textwrap.shorten(str(error), 200, placeholder="...")
        if isinstance(error, ImportError):
            raise ImportError(f"tokenizer={str(given)!r} takes a package that is not installed: {why}") from error
        raise ValueError(
            f"tokenizer={str(given)!r} cannot be loaded by transformers ({type(error).__name__}: {why}); "
            f"{_remedy(files, str(error))}"
        ) from error


def _remedy(files: Sequence[Path], error: str) -> str:
    """Return the remedy for a Hugging Face tokenizer that cannot be loaded."""
    for file in files:
        if not _holds_an_object(file):
            return f"{file.name} is no object of JSON: download or save it again"
    if "trust_remote_code" in error:
        return (
            "no code of a tokenizer is run here: load it in Python with trust_remote_code=True, and give it to "
            "nanopack.Loader"
        )
    return "download or save it again"


def _holds_an_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return False


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
