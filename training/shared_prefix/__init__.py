"""A GRPO trainer that computes each group's image and prompt once."""
