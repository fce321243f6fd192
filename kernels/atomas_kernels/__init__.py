"""Operators of the Atomas method. Standalone: needs torch, and triton where there is a GPU."""
