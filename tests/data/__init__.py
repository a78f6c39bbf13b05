"""Tests of ggft.data."""
