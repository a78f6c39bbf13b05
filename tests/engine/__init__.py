"""Tests of ggft.engine."""
