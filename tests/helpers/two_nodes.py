"""Two Ray nodes on this machine, of which one dies in the middle. Run by test_two_nodes.py in a process of its own.

Prints the nodes that the actors were on, and a digest of what was captured.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

from ray.cluster_utils import Cluster

from helpers.derivation import config, varied
from steer_engine.derive.actors import PAIRS_PER_CHUNK, capture_pool

SETTLE_SECONDS = 180


def nodes_of_actors() -> list[str]:
    from ray._private.state import actors

    return sorted(actor["Address"]["NodeID"] for actor in actors().values() if actor["State"] == "ALIVE")


def nodes_once_settled(dead: str) -> list[str]:
    """Of the actors, when Ray has noticed what died and has started it anew; on a busy machine that takes a while."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        nodes = nodes_of_actors()
        if (len(nodes) == 2 and dead not in nodes) or time.monotonic() > deadline:
            return nodes
        time.sleep(0.5)


def main(model: str) -> None:
    # Each node has room for both actors, so that one can take over from the other.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    second = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    sha = hashlib.sha256()
    seen = []
    with capture_pool(config(model, blocks=(0, 2)), actors=2, ray_address=cluster.address) as engines:
        engines.facts()
        seen.append(nodes_of_actors())
        chunks = engines.capture_pairs(varied(9 * PAIRS_PER_CHUNK + 5), keep_rows_of=10**9)
        for index, chunk in enumerate(chunks):
            sha.update(chunk.positive.sum_LD.tobytes() + chunk.negative.sum_LD.tobytes())
            if index == 1:
                cluster.remove_node(second, allow_graceful=False)
        seen.append(nodes_once_settled(second.node_id))
    print(json.dumps({"nodes": seen, "second": second.node_id, "digest": sha.hexdigest()}))
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
