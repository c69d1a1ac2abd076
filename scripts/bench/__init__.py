"""Ratios against peers, a file a bench: `python -m scripts.bench --help`. Results stand in docs/benchmarks.md."""
