"""The cluster for development and tests: `Cluster(name="demo", gpus=2).up()` or `python -m devcluster up --name demo`.

Everything in it is real. Where a Docker engine runs it is kind; elsewhere it is one native node in a network namespace
of its own. Built programs and images live in the cache, keyed by what they are made of; a cluster's own files live in
its state folder and go with `down`.
"""

from devcluster.cluster import Cluster, S3Info

__all__ = ["Cluster", "S3Info"]
