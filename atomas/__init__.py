"""Atomas: train molecule-text models with hierarchical adaptive alignment on GPU clusters."""

from atomas.version import __version__

__all__ = ["__version__"]
