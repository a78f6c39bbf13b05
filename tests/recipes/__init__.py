"""Tests of ggft.recipes."""
