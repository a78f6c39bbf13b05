"""Measurements: ggft beside its peers, parity with them, and models to measure with."""
