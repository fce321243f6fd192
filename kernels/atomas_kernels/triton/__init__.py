"""Triton operators for CUDA devices."""
