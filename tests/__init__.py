"""Tests of ggft; `reference` and `models` are their common ground."""
