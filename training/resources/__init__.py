"""Estimates the memory, disk and hours of a training, and tries its largest batch."""
