"""The embedded corpus: generated molecules, and descriptions grounded in their atoms."""

from atomas.data.demo.corpus import build_demo_corpus

__all__ = ["build_demo_corpus"]
