"""Benchmarks of the operators beside the published form, plain PyTorch, torch.compile and other packages.

    python -m atomas_kernels.bench --op token_interaction --batch 8 32 --json result.json

Nothing is timed before its results agree with float64.
"""
