"""Perch: CNN checkpoints to a canaried Triton endpoint.

Flow: observe (watch caches) -> plan (pure) -> execute (server-side apply). See docs/architecture.md.
"""

__version__ = "0.1.0"
