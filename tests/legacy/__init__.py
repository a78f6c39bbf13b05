"""Tests of ggft.legacy."""
