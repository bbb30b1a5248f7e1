"""Evaluates policies: modes of inference, metrics with intervals, changes between two policies."""
