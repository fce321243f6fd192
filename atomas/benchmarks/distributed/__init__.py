"""Benchmark of the hierarchical alignment over ranks: ours beside the forms of others, measured and on paper."""
