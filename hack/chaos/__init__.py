"""`make chaos`: a cluster of its own, two versions of a model under load from both protocols, and every fault that we can cause.

`scenarios` lists what is done, `stage` is what it is done to, `__main__` counts requests and writes docs/reliability.md.
"""
