"""The Luigi tasks: their parameters, their inputs, and the functions that they call."""
