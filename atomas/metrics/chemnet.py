"""Fréchet ChemNet Distance, where the package `fcd`, which brings the weights, is installed."""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Sequence

from atomas.metrics.scores import Score

NOT_INSTALLED = "no ChemNet weights: the package fcd, which brings them, is not installed (extra 'fcd')"
NO_INTERVAL = "no interval: not a function of sums over rows"


def fcd_is_installed() -> bool:
    """Whether the package is there, without importing it (and torch)."""
    return importlib.util.find_spec("fcd") is not None


def fcd_score(references: Sequence[str], outputs: Sequence[str]) -> Score:
    """Distance between two sets of canonical SMILES, lower is better.

    Null with a reason if the package is not there, fails, or a set has fewer than two molecules.
    """
    if not fcd_is_installed():
        return Score(value=None, reason=NOT_INSTALLED)
    if min(len(references), len(outputs)) < 2:
        return Score(value=None, reason="fewer than two valid molecules")
    fcd = importlib.import_module("fcd")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the package about its own dependencies
            value = float(fcd.get_fcd(list(references), list(outputs), fcd.load_ref_model()))
    except Exception as error:  # an optional package must not cost the metrics that are there
        return Score(value=None, reason=f"the package fcd failed: {type(error).__name__}: {error}")
    if not math.isfinite(value):
        return Score(value=None, reason="the package fcd gave no finite number")
    return Score(value=value, reason=NO_INTERVAL)
