"""Memory, communication and time of a step on paper: formulas of the method's sizes, no torch."""
