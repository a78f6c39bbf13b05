"""Tests of ggft.training."""
