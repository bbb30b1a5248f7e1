"""The model that is trained: loaded, frozen in parts, adapted, shared out, beside vLLM."""
