"""Generates text: engines (vLLM, a server, transformers), and worker pools that run them."""
