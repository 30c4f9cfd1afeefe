"""Measured comparisons."""
