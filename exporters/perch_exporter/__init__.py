"""Perch's exporter: brings a checkpoint, exports it, proves it, publishes it, and proves it again beside each Triton.

This module imports nothing, because the operator imports `perch_exporter.contract` and must stay free of torch,
numpy and the object store's library.
"""
