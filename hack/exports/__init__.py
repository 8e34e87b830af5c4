"""Every kind of checkpoint, exported, published, served on a real cluster and asked: what it answers is what torch answered.

    python -m exports                             # the whole list, one after the other: an hour or two
    python -m exports --only resnet18 --only ONNX

`cases` is the list. `make` builds a case's network with torch, in the exporter image's environment, and writes its checkpoint in
the case's format beside the network's own answers to some inputs; `play` has the cluster export and serve it, and asks the same;
`report` keeps the table in docs/exports.md.
"""
