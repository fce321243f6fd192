"""Operators of the compiled CUDA library (csrc/cuda), declared to torch so that autograd and torch.compile see them.

The library has a C interface and its own CUDA runtime, so one build serves every version of torch, and it loads
where there is no GPU. Importing a module with operators raises ImportError where it was not built. Tokens and
sources of half precision are computed in float32; every run gives the same bits.
"""
