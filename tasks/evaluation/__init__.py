"""Modes of inference, metrics with intervals, and what changed between two policies."""
