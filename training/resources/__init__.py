"""Estimates the GPU memory, main memory and disk of a training, and tries its largest batch."""
