"""GRPO in which a group's image and prompt go through the model once."""
