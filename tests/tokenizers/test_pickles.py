"""Hostile and broken pickles are refused, and run nothing."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from bundled import PATTERN

from nanopack.tokenizers import rank_files as encodings
from nanopack.tokenizers.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("chat32k")


class Runs:
    """Unpickled by pickle.load, this calls `function(*args)`."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def string(text: str) -> bytes:
    """The opcode that pushes a string."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def call(function: bytes, argument: str) -> bytes:
    """A pickle by hand: push the function, push the argument, call."""
    return b"c" + function.replace(b" ", b"\n") + b"\n" + string(argument) + b"\x85R."


def with_state(state: bytes) -> bytes:
    """A pickle by hand: an Encoding, given the state that the opcodes `state` push."""
    return b"\x80\x02ctiktoken.core\nEncoding\n)\x81" + state + b"b."


def with_changed_state(**changes: object) -> bytes:
    return with_state(pickle.dumps({**STATE, **changes}, 3)[2:-1])


STATE = {
    "name": "x",
    "pat_str": PATTERN,
    "mergeable_ranks": TOKENIZER.encoding._mergeable_ranks,
    "special_tokens": TOKENIZER.encoding._special_tokens,
}
REAL = pickle.dumps(TOKENIZER.encoding, 4)
TOUCH = Runs(os.system, "touch marker")
# Where pickle itself reads one of these, there is a file named marker.
RUNS_CODE = {
    **{f"os.system-protocol-{protocol}": pickle.dumps(TOUCH, protocol) for protocol in range(6)},
    "eval": pickle.dumps(Runs(eval, "open('marker', 'w')")),
    "exec": pickle.dumps(Runs(exec, "open('marker', 'w')")),
    "open": pickle.dumps(Runs(open, "marker", "w")),
    "nested": pickle.dumps(Runs(pickle.loads, pickle.dumps(TOUCH))),
    "next-to-an-encoding": pickle.dumps([TOKENIZER.encoding, TOUCH]),
    "before-an-encoding": pickle.dumps(TOUCH, 2)[:-1] + b"0" + REAL,
    "in-the-state": with_changed_state(name=TOUCH),
    "python-2-name": call(b"__builtin__ eval", "open('marker', 'w')"),
    "through-a-module-of-tiktoken": b"\x80\x04"
    + string("tiktoken.load")
    + string("os.system")
    + b"\x93"
    + string("touch marker")
    + b"\x85R.",
    "opcode-inst": b"(" + string("touch marker") + b"ios\nsystem\n.",
    "opcode-obj": b"(cos\nsystem\n" + string("touch marker") + b"o.",
}
NO_ENCODING = {
    "dotted-name": b"\x80\x04" + string("tiktoken.core") + string("Encoding.__init__.__globals__") + b"\x93.",
    "function-of-tiktoken": call(b"tiktoken.load read_file", "tokenizer.pkl"),
    "get-encoding": call(b"tiktoken get_encoding", "gpt2"),
    "getattr": call(b"builtins getattr", "x"),
    "copyreg": call(b"copyreg __newobj__", "x"),
    "encoding-protocol-0": pickle.dumps(TOKENIZER.encoding, 0),
    "encoding-protocol-1": pickle.dumps(TOKENIZER.encoding, 1),
    # Up to protocol 2, bytes are pickled as a call of _codecs.encode.
    "encoding-protocol-2": pickle.dumps(TOKENIZER.encoding, 2),
    "encoding-of-another-module": with_changed_state().replace(b"tiktoken.core", b"tokenizers", 1),
    "state-is-a-name": with_state(string("gpt2")),
    "state-is-missing": with_state(b"")[:-2] + b".",
    "state-is-a-list": with_state(b"]"),
    "state-lacks-keys": with_state(b"}" + string("name") + string("x") + b"s"),
    "state-has-a-key-more": with_changed_state(explicit_n_vocab=3),
    "name-is-a-number": with_changed_state(name=5),
    "state-for-the-class": b"ctiktoken.core\nEncoding\n}" + string("state") + string("gpt2") + b"sb.",
    "the-class-itself": b"ctiktoken.core\nEncoding\n.",
    "called-with-an-argument": call(b"tiktoken.core Encoding", "x"),
    "called-without-arguments": b"ctiktoken.core\nEncoding\n)R.",
    "extension": b"\x80\x02\x82\xf0.",
    "persistent-id": string("something") + b"Q.",
    "persistent-id-as-text": b"Psomething\n.",
    "out-of-band-buffer": b"\x80\x05\x97.",
    "dict": pickle.dumps(STATE),
    "none": pickle.dumps(None),
    "tuple": pickle.dumps((TOKENIZER.encoding,)),
    "another-class": pickle.dumps(SimpleNamespace(enc=1)),
    "truncated": REAL[: len(REAL) // 2],
    "without-its-last-byte": REAL[:-1],
    "empty": b"",
    "text": b"this is not a pickle",
    "json": b'{"model": {}}',
    "only-stop": b".",
    "stack-underflow": b"\x80\x02R.",
    "protocol-from-the-future": b"\x80\x09.",
    "absurd-length": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
}


@pytest.mark.parametrize("data", [pytest.param(d, id=case) for case, d in {**RUNS_CODE, **NO_ENCODING}.items()])
def test_a_pickle_that_is_not_an_encoding_is_refused_and_runs_nothing(data, tmp_path, monkeypatch):
    def refuse(name: str) -> None:
        raise AssertionError(f"looked up {name}")

    monkeypatch.setattr("tiktoken.registry.get_encoding", refuse)
    monkeypatch.chdir(tmp_path)
    stand_in = dict(vars(encodings._State))
    Path("tokenizer.pkl").write_bytes(data)
    for given_as in ("tokenizer.pkl", "."):
        with pytest.raises(ValueError, match=r"^tokenizer.pkl is not a pickled tiktoken Encoding \(") as caught:
            load_tokenizer(given_as)
        remedy = "Nothing in it was executed. Save the tokenizer again with pickle.dump(encoding, file), or pass"
        assert remedy in str(caught.value)
        assert os.listdir() == ["tokenizer.pkl"]
    assert dict(vars(encodings._State)) == stand_in


@pytest.mark.parametrize("data", [pytest.param(data, id=case) for case, data in RUNS_CODE.items()])
def test_pickle_itself_would_run_them(data, tmp_path, monkeypatch):
    """Without this the table above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(TypeError):
        pickle.loads(data)
    assert Path("marker").exists()


def test_an_error_about_a_pickle_says_what_it_asked_for(tmp_path):
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(RUNS_CODE["os.system-protocol-0"])
    with pytest.raises(ValueError, match=r"it asks for (posix|nt)\.system\)"):
        load_tokenizer(file)
    file.write_bytes(pickle.dumps(TOKENIZER.encoding, 0))
    with pytest.raises(ValueError, match=r"it asks for copy_?reg\._reconstructor\)"):
        load_tokenizer(file)
    file.write_bytes(with_state(string("gpt2")))
    with pytest.raises(ValueError, match=r"it only names 'gpt2', so pass tiktoken.get_encoding\('gpt2'\)"):
        load_tokenizer(file)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mergeable_ranks": {b"a": 0, b"b": 0}}, id="equal-ranks-make-tiktoken-panic"),
        pytest.param({"mergeable_ranks": {b"a": 0}}, id="bytes-without-a-rank"),
        pytest.param({"mergeable_ranks": {}}, id="no-ranks"),
        pytest.param({"mergeable_ranks": {"a": 0}}, id="text-for-bytes"),
        pytest.param({"mergeable_ranks": {b"a": "0"}}, id="text-for-a-rank"),
        pytest.param({"mergeable_ranks": [b"a"]}, id="a-list-of-ranks"),
        pytest.param({"pat_str": "("}, id="broken-pattern"),
        pytest.param({"pat_str": 5}, id="a-number-for-a-pattern"),
        pytest.param({"special_tokens": {"<|bos|>": -1}}, id="negative-id"),
        pytest.param({"special_tokens": None}, id="special-tokens-are-none"),
    ],
)
def test_an_encoding_that_cannot_work_is_refused_when_its_pickle_is_read(changes, tmp_path, capfd):
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(with_changed_state(**changes))
    with pytest.raises(ValueError, match=r"tokenizer.pkl: (tiktoken rejects|byte 0x00 has no rank)"):
        load_tokenizer(file)
