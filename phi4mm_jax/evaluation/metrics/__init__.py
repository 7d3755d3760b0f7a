"""Metrics, by name."""
