"""The methods that can be trained: DiVE-k, its ablations, and the baselines it is compared with.

A method is what differs from [BuildMCQ] and [Train]: which question is asked, where its wrong
options come from, what is paid for. All see the same training images and take the same steps.
"""

from dataclasses import dataclass

from pipeline.settings import SettingsError


@dataclass(frozen=True)
class Method:
    """How a method departs from the settings.

    `questions` is mcq, over candidates, or open; `options_from` and `prompt_style` take the place
    of the settings of that name; `answer` is the reward in place of `letter`, `format` that in
    place of `format`; `truth_rollout` puts the truth among every group's completions.
    """

    about: str
    questions: str = "mcq"
    options_from: str = ""
    prompt_style: str = ""
    answer: str = "letter"
    format: str = "format"
    truth_rollout: bool = False
    supervised: bool = False

    @property
    def refreshes(self) -> bool:
        """Whether a later round has new questions; others train all rounds' steps in one."""
        return self.questions == "mcq"

    def rewards(self, given: dict[str, float]) -> dict[str, float]:
        """[Train] rewards with this method's in the place of format and letter."""
        names = {"letter": self.answer, "format": self.format}
        return {names.get(name, name): weight for name, weight in given.items()}


METHODS = {
    "dive_k": Method("multiple-choice questions about the policy's own candidates"),
    "virft": Method("the open question, paid by exact match", questions="open", answer="exact"),
    "virft_compat": Method(
        "the open question, paid as Visual-RFT does", questions="open", answer="virft_compat"
    ),
    "sft": Method(
        "supervised on the answer to the open question", questions="open", supervised=True
    ),
    "random_mcq": Method("questions with random wrong options", options_from="random"),
    "text_mcq": Method("questions with wrong options alike in name", options_from="text"),
    "visurf": Method(
        "as dive_k, with the truth among every group's completions", truth_rollout=True
    ),
    "caption": Method(
        "as dive_k, describing the image before reasoning about it",
        prompt_style="caption",
        format="caption_format",
    ),
}
ZERO_SHOT = "zero_shot"  # the base policy, evaluated
NAMES = (*METHODS, ZERO_SHOT)


def method_of(name: str) -> Method:
    """The method of that name; zero_shot has DiVE-k's settings and is never trained.

    Raises SettingsError for an unknown name.
    """
    if name == ZERO_SHOT:
        return METHODS["dive_k"]
    if name not in METHODS:
        raise SettingsError(f"unknown method {name!r}; known: {', '.join([*METHODS, ZERO_SHOT])}")
    return METHODS[name]


def num_rounds(name: str, rounds: int) -> int:
    """In how many rounds a method trains, where [run] sets `rounds`."""
    return rounds if method_of(name).refreshes else 1
