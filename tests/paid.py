"""Rewards for tests: an untrained policy earns different amounts, so that it learns something."""


def by_length(completions, completion_ids, **columns):
    """Shorter is better, and odd token ids are better: two completions hardly ever earn alike."""
    return [-len(ids) / 10 + sum(token % 7 for token in ids) / 50 for ids in completion_ids]


def equal(completions, **columns):
    """Every completion earns the same: no group carries a gradient."""
    return [1.0] * len(completions)


def on_some_questions(completions, completion_ids, mcq_id, **columns):
    """Only about every other question tells its completions apart."""
    tells = [int(name[0], 16) % 2 for name in mcq_id]
    return [tell * sum(ids) / 100 for tell, ids in zip(tells, completion_ids, strict=True)]


def now_and_then_infinite(completions, completion_ids, **columns):
    """As by_length, but the first completion of each group of four earns infinitely much."""
    paid = by_length(completions, completion_ids)
    return [value if place % 4 else float("inf") for place, value in enumerate(paid)]


def broken(completions, **columns):
    """Fails on what a policy wrote."""
    raise KeyError("colour")


def without_columns(completions):
    """Not in the form of a reward."""
    return [0.0] * len(completions)
