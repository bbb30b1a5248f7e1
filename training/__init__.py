"""The torch world: supervised and reinforcement training of policies."""
