"""Tests of ggft.setup."""
