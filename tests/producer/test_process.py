"""The producer's process: how it starts, what it needs, and that batches do not depend on how many there are."""

from __future__ import annotations

import multiprocessing
import sys

import pytest
from faulty import CHATS, SMALL, TOKENIZER, ready, wait_until, within
from hypothesis import example, given
from hypothesis import strategies as st
from trainer_script import script

from nanopack import Loader, reference
from nanopack.packing import BestFitPad
from nanopack.packing.packings import PACKINGS
from nanopack.verify import compare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")


def test_a_daemonic_process_gets_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(ValueError, match="num_workers=0 there"):
        Loader(CHATS, TOKENIZER, **SMALL)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_producer_that_is_not_forked_gives_the_same_batches(method, workers):
    arguments = dict(epochs=1, num_workers=workers, start_method=method, **SMALL)
    with within(100), Loader(CHATS, TOKENIZER, **arguments) as loader:
        assert compare(reference.batches(CHATS, TOKENIZER, epochs=1, **SMALL), loader).difference is None


SPAWNED = """
if __name__ == "__main__":
    import data
    arguments = dict(batch_size=1, seq_len=8, packing="stream", loss="all", epochs=1, start_method="spawn")
    with nanopack.Loader(data.Reporting(), "chat32k", **arguments) as loader:
        for batch in loader:
            pass
    from pathlib import Path
    print(Path(data.__file__).with_name("modules").read_text())
"""


DATA = """
import sys
from pathlib import Path
class Reporting(list):
    def __init__(self):
        super().__init__([{"text": "a b c d e f g h"}] * 4)
    def __getitem__(self, i):
        if i == 3:
            roots = {name.split(".")[0] for name in sys.modules}
            Path(__file__).with_name("modules").write_text(" ".join(sorted(roots)))
        return super().__getitem__(i)
"""


def test_a_producer_imports_no_triton(tmp_path):
    with script(tmp_path, SPAWNED, data=DATA) as trainer:
        out, err = trainer.communicate(timeout=100)
        assert err == "" and "nanopack" in out.split() and "triton" not in out.split()


chats = st.lists(st.text("ab ", max_size=30).map(lambda text: {"text": "x" + text}), min_size=1, max_size=12)


@example(data=CHATS, packing="best_fit", workers=4, prefetch=8, epochs=2, batch_size=2)
@given(
    data=chats,
    packing=st.sampled_from(list(PACKINGS)),
    workers=st.sampled_from([0, 1, 2, 4]),
    prefetch=st.integers(1, 8),
    epochs=st.integers(1, 3),
    batch_size=st.integers(1, 3),
)
def test_workers_and_prefetch_change_nothing(data, packing, workers, prefetch, epochs, batch_size):
    arguments = {
        "batch_size": batch_size,
        "seq_len": 16,
        "packing": packing,
        "loss": "all",
        "epochs": epochs,
        "loss_weights": "conversation",
        "extras": ("positions", "doc_ids", "cu_seqlens"),
        "max_pieces": 16,
    }
    wanted = reference.batches(data, TOKENIZER, **arguments)
    inline = Loader(data, TOKENIZER, num_workers=0, **arguments)
    with within(60), Loader(data, TOKENIZER, num_workers=workers, prefetch=prefetch, **arguments) as loader:
        assert compare(wanted, loader).difference is None
        assert len(list(inline)) == loader.stats()["batches"] and inline.ledger() == loader.ledger()


def test_news_of_all_slots_fit_the_pipe_though_a_batch_has_many_pieces():
    chats = [{"text": "a"}] * 10
    with Loader(chats, TOKENIZER, batch_size=16, seq_len=512, packing="stream", loss="all", prefetch=4) as loader:
        next(loader)
        wait_until(lambda: ready(loader) >= 3)


def test_more_requests_than_a_pipe_holds_do_not_lock_the_workers_up():
    """A thousand rows read side by side, each a chunk ahead, and documents that fill the pipe of the results."""
    chats = [{"text": f"{'a b c d e f g h ' * 400}{k}"} for k in range(1200)]
    arguments = dict(batch_size=1000, seq_len=16, shard="row", packing=BestFitPad(window=2), loss="all")
    with within(60), Loader(chats, TOKENIZER, num_workers=2, **arguments) as loader:
        batch = next(loader)
    expected = next(reference.batches(chats, TOKENIZER, **arguments))
    assert compare(iter([expected]), iter([batch])).difference is None
