"""Generates completions with transformers models, each prompt going through the model once."""
