"""Comparisons: what methods cost on a machine, and what they learn at equal size."""
