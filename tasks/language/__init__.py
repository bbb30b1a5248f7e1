"""Words: prompts, answers read from completions, names matched to classes."""
