"""Checkpoints of every kind, with what torch itself answers: what tests export, serve and ask.

`make` builds a network with torch, in the exporter image's environment, and writes its checkpoint in the format that is asked for
beside the network's own answers to some inputs.
"""
