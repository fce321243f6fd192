"""Plain PyTorch operators: the oracle that every other backend is tested against."""
