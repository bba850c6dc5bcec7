"""On a Ray cluster of two nodes, tokenizing gives the bytes that it gives here, whatever dies in its middle."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_sets import SHIPPED

from nanopack.store import is_store, job
from nanopack.store.tokenize import tokenize

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "support" / "ray_run.py"


def written(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("how", ["calm", "killed"])
def test_a_cluster_writes_the_same_bytes_also_where_a_worker_and_a_node_are_killed(tmp_path, how, monkeypatch):
    monkeypatch.setattr(job, "LEAST_CONVERSATIONS", 100)
    tokenize([SHIPPED] * 2, "chat32k", tmp_path / "here", num_workers=0)
    command = [sys.executable, str(SCRIPT), str(SHIPPED), str(tmp_path / "ray"), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "ray.json").read_text())
    assert found["nodes"] == 2 and found["parts"] == 50
    if how == "killed":
        # both died in the middle
        assert found["worker"] and found["parts_then"] < 50 and found["node"] and found["parts_at_node"] < 50
    assert written(tmp_path / "ray") == written(tmp_path / "here")


def test_a_driver_killed_at_20_moments_and_run_again_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "LEAST_CONVERSATIONS", 100)
    tokenize([SHIPPED] * 2, "chat32k", tmp_path / "here", num_workers=0)
    expected, out, address = written(tmp_path / "here"), tmp_path / "ray", tmp_path / "address"
    cluster = subprocess.Popen([sys.executable, str(SCRIPT), str(address), "-", "serve"], stdin=subprocess.PIPE)
    while not address.exists():
        assert cluster.poll() is None
        time.sleep(0.1)
    draw, moments = random.Random(1), []

    def start() -> subprocess.Popen:
        command = [sys.executable, str(SCRIPT), str(SHIPPED), str(out), address.read_text()]
        return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)

    for _ in range(20):
        driver, moment = start(), draw.randrange(55)
        while driver.poll() is None and len([*out.glob("part-*.words")]) < moment:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        found = written(out) if out.exists() else {}
        moments.append(len(found))
        assert all(expected[name] == content for name, content in found.items() if name in expected)
        if is_store(out) or draw.random() < 0.3:
            # what the killed driver had asked for ends by itself
            time.sleep(1)
            shutil.rmtree(out, ignore_errors=True)
    assert start().wait() == 0
    assert written(out) == expected and len(set(moments)) > 5, moments
    cluster.communicate(b"")


def test_a_bad_conversation_is_named_as_without_a_cluster(tmp_path):
    script = (
        "import sys; from nanopack.store.ray import on_ray; from nanopack.store.tokenize import tokenize\n"
        "try: tokenize([{'text': 'a'}, {'text': 1}], 'chat32k', sys.argv[1], engine=on_ray())\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.stdout.startswith("ConversationError conversation 1, text must be"), done.stdout + done.stderr[-2000:]
