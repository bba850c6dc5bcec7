"""Tokenize on a Ray cluster of two nodes, processes on this machine, while workers and then a node are killed.

python ray_run.py CONVERSATIONS OUT calm|killed   ->   OUT.json
python ray_run.py ADDRESS_FILE - serve            ->   a cluster, until stdin ends
python ray_run.py CONVERSATIONS OUT ADDRESS       ->   a driver on it
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from nanopack.store import job
from nanopack.store.ray import on_ray
from nanopack.store.tokenize import tokenize


def wait_for(out: Path, parts: int) -> None:
    while len([*out.glob("part-*.words")]) < parts:
        time.sleep(0.01)


def workers_at_work() -> list[int]:
    """Process ids of Ray's workers that run a task of ours."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        if name == b"ray::_write":
            found.append(int(folder.name))
    return found


def kill(cluster: Cluster, node: object, out: Path, killed: dict[str, object]) -> None:
    """Kill a worker in the middle of its part, and later a node with all that runs on it."""
    wait_for(out, 3)
    while not (found := workers_at_work()):
        time.sleep(0.005)
    os.kill(found[0], signal.SIGKILL)
    killed["worker"] = found[0]
    killed["parts_then"] = len([*out.glob("part-*.words")])
    wait_for(out, 8)
    cluster.remove_node(node, allow_graceful=False)
    killed["node"] = True
    killed["parts_at_node"] = len([*out.glob("part-*.words")])


def start() -> tuple[Cluster, object]:
    """Two nodes of one core each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    return cluster, second


def serve(address: Path) -> None:
    """Write the address of a cluster, and keep it until stdin ends."""
    cluster, _ = start()
    address.with_suffix(".new").write_text(cluster.address)
    address.with_suffix(".new").rename(address)
    sys.stdin.read()
    cluster.shutdown()


def main(conversations: str, out: Path, how: str) -> None:
    cluster, second = start()
    engine = on_ray(cluster.address)
    killed: dict[str, object] = {"nodes": len(ray.nodes())}
    killer = threading.Thread(target=kill, args=(cluster, second, out, killed))
    if how == "killed":
        killer.start()
    store = tokenize([conversations] * 2, "chat32k", out, engine=engine)
    if how == "killed":
        killer.join()
    # Ray's own words come on stdout too
    Path(f"{out}.json").write_text(json.dumps({**killed, "documents": len(store), "parts": len(store.shards)}))
    ray.shutdown()
    cluster.shutdown()


job.LEAST_CONVERSATIONS = 100
if sys.argv[3] == "serve":
    serve(Path(sys.argv[1]))
elif sys.argv[3] in ("calm", "killed"):
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
else:
    tokenize([sys.argv[1]] * 2, "chat32k", sys.argv[2], engine=on_ray(sys.argv[3]))
