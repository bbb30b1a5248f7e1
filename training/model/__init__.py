"""The trained model: loading, freezing, LoRA, sharding over processes, and vLLM beside it."""
