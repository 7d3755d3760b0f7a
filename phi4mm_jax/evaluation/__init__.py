"""Batch evaluation: tasks in, scores out."""
