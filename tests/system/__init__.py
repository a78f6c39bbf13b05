"""Tests of ggft.system."""
