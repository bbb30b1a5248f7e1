"""The Luigi tasks: parameters, what each needs, and the function it calls."""
