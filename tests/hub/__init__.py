"""Tests of ggft.hub."""
