"""The text side: prompts, answers read from completions, free-text names matched to classes."""
