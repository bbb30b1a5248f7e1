"""Who generates text: vLLM, a server, transformers; one process a GPU, or a cluster."""
