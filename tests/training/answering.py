"""Completions that are given to the trainer in place of a policy's own, since a tiny one says nothing."""

from training.loop import sampling
from training.loop.sampling import Timed


def give(monkeypatch, answers: list[str]) -> None:
    """Every group's completions give these answers, in this order."""
    monkeypatch.setattr(sampling, "Timed", timed(answers))


def timed(answers: list[str]) -> type[Timed]:
    """What takes the place of Timed, so that every group gives these answers in this order."""

    class Given:
        """Mixed into the trainer between Timed and TRL's own, which then decodes these tokens."""

        def _generate_single_turn(self, prompt_ids, *_, **__):
            first = self.accelerator.process_index * len(prompt_ids)
            return [self._said(first + place) for place in range(len(prompt_ids))], None

        def _said(self, place):
            text = f"<think>x</think><answer>{answers[place % len(answers)]}</answer>"
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return [*ids, self.eos_token_ids[0]]

    class GivenTimed(Timed, Given):
        """Takes the place of Timed, which stands right before TRL's own trainer."""

    return GivenTimed
