"""Where images come from, what is kept of them, and how a set is split."""
