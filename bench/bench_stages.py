"""How long does each stage take for the batches of the shipped conversations?  make bench

Medians of each stage alone, on one core: rendering, packing (lengths only), filling a slot, the torch executor, and the
whole loader in the caller's thread. Compare each stage with the whole of the same run; the times depend on the machine.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from nanopack import Loader
from nanopack.config import LoaderConfig
from nanopack.conversations.records import check, open_conversations
from nanopack.data import CONVERSATIONS
from nanopack.packing.packings import PACKINGS, as_packing
from nanopack.producer.producer import Producer
from nanopack.producer.reader import Reader
from nanopack.render.renderer import Renderer
from nanopack.ring.ring import Ring
from nanopack.tokenizers.tokenizer import load_tokenizer
from nanopack.upload.executor import make_kernel
from nanopack.upload.outputs import outputs_maker

TOKENIZER = load_tokenizer("chat32k")
CONFIG = LoaderConfig(batch_size=32, seq_len=2048, epochs=1)


@pytest.fixture(autouse=True)
def one_thread():
    """Give torch one thread, so that stages are compared alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rendering(benchmark):
    render, source = Renderer(TOKENIZER, "nanochat"), open_conversations(CONVERSATIONS)
    conversations = [check(source[i]) for i in range(len(source))]
    benchmark.pedantic(lambda: [render(c) for c in conversations], rounds=5, warmup_rounds=1)


def test_the_tokenizer_alone(benchmark):
    source = open_conversations(CONVERSATIONS)
    texts = [
        part if isinstance(part, str) else part.text
        for i in range(len(source))
        for message in check(source[i]).messages
        for part in ([message.content] if isinstance(message.content, str) else message.content)
    ]
    encode = TOKENIZER.encoding.encode_ordinary
    benchmark.pedantic(lambda: [encode(text) for text in texts], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_a_million_tokens(benchmark, packing):
    lengths = [100 + 37 * i % 900 for i in range(1900)]

    def pack():
        items = iter([(range(len(lengths)), lengths)])
        packer = as_packing(packing).build(lambda: next(items, None), batch_size=32, seq_len=2048)
        while packer.next_rows().num_rows:
            pass

    benchmark.pedantic(pack, rounds=5, warmup_rounds=1)


def test_filling_and_unpacking_one_batch(benchmark):
    reader = Reader(open_conversations(CONVERSATIONS), TOKENIZER, CONFIG)
    ring = Ring(reader.layout, 1)
    Producer(reader).produce(ring.slots[0])
    cpu = torch.device("cpu")
    kernel = make_kernel("torch", cpu, reader.layout, TOKENIZER.bos_id, -100)
    staged = torch.from_numpy(ring.slots[0].buffer)
    make_outputs = outputs_maker(CONFIG, reader.layout, cpu)
    benchmark(lambda: kernel(staged, make_outputs()))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_whole_loader_ten_epochs(benchmark, workers):
    def run():
        with Loader(CONVERSATIONS, TOKENIZER, epochs=10, num_workers=workers) as loader:
            return sum(batch.num_tokens for batch in itertools.islice(loader, None))

    tokens = benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    benchmark.extra_info["tokens"] = tokens
