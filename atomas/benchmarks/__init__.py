"""Benchmarks of the whole: the training step beside its published form."""
