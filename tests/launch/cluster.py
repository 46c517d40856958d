"""Two nodes of Ray on this machine: prints the address; a line of input, the beginning of a node's id, removes that.

cluster.py FOLDER FOLDER: of each node its scratch; without, they share the checkout's disk.
"""

import sys

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False})
try:
    nodes = []
    for number in range(2):
        variables = {"CBML_SCRATCH": sys.argv[1 + number]} if sys.argv[1:] else {}
        nodes.append(cluster.add_node(num_cpus=1, num_gpus=1, env_vars=variables))
    print(cluster.address, flush=True)
    for line in sys.stdin:
        for node in nodes:
            if node.node_id.startswith(line.strip()):
                cluster.remove_node(node, allow_graceful=False)
finally:
    cluster.shutdown()
