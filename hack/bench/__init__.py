"""Benchmarks: `make bench`. Figures go into docs/benchmarks.md by hand, with the command; ratios are taken within one run."""
