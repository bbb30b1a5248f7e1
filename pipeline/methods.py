"""The training methods: DiVE-k, its ablations, and the baselines that it is compared with.

A method overrides settings of [BuildMCQ] and [Train]: the question, the source of its wrong options,
the rewards. All methods see the same training images and take the same number of steps.
"""

from dataclasses import dataclass

from pipeline.config_files import SettingsError
from tasks.runtime.errors import StageError
from tasks.runtime.protocol import METHOD_NAMES, ZERO_SHOT
from tasks.runtime.settings import nearest

# Prompt style -> the reward for the form that it asks for; of other styles it is format.
FORMATS = {"caption": "caption_format", "direct": "direct_format"}


@dataclass(frozen=True)
class Method:
    """The settings that a method overrides.

    `questions` is mcq (over candidates) or open. `options_from` and `prompt_style` replace the
    settings of these names where they are not empty. `answer` is the reward that replaces `letter`.
    `answer_from` is what counts as the truth, where it is not empty. `unlabelled` trains without any
    label. `pairs` asks each question with its partner. `truth_rollout` adds the truth to the completions
    of every group.
    `supervised` trains on labels, without GRPO. `one_round` takes all steps on the first questions.
    """

    about: str
    questions: str = "mcq"
    options_from: str = ""
    prompt_style: str = ""
    answer: str = "letter"
    answer_from: str = ""
    unlabelled: bool = False
    pairs: bool = False
    truth_rollout: bool = False
    supervised: bool = False
    one_round: bool = False

    @property
    def refreshes(self) -> bool:
        """Whether later rounds ask new questions. Other methods train all steps in one round."""
        return self.questions == "mcq" and not self.one_round

    def rewards(self, weights: dict[str, float], style: str) -> dict[str, float]:
        """The weights of [Train] rewards, with this method's in the place of letter.

        The reward of the form that the prompt style asks for is in the place of format. Raises
        StageError where the one that takes a place has a weight of its own.
        """
        names = {"letter": self.answer, "format": FORMATS.get(style, "format")}
        for name, own in names.items():
            if name != own and name in weights and own in weights:
                raise StageError(
                    f"[Train] rewards has both {name} and {own}, which takes the place of {name} with this "
                    f"method or prompt style; leave {own} out"
                )
        return {names.get(name, name): weight for name, weight in weights.items()}


METHODS = {
    "dive_k": Method("multiple-choice questions about the policy's own candidates"),
    "no_refresh": Method("as dive_k, with all steps on the first questions", one_round=True),
    "virft": Method("the open question, paid by exact match", questions="open", answer="exact"),
    "virft_compat": Method(
        "the open question, paid as Visual-RFT does", questions="open", answer="virft_compat"
    ),
    "ttrv": Method(
        "the open question without labels, paid by agreement within the group",
        questions="open",
        answer="frequency",
        unlabelled=True,
    ),
    "dive_k_majority": Method(
        "as dive_k, with the policy's majority vote in the place of the label",
        answer_from="majority",
    ),
    "sft": Method(
        "supervised on the answer to the open question", questions="open", supervised=True
    ),
    "random_mcq": Method("questions with random wrong options", options_from="random"),
    "text_mcq": Method("questions with wrong options alike in name", options_from="text"),
    "hard_negative": Method(
        "questions with the wrong options that are confused with the truth most often over the set",
        options_from="hard_negative",
    ),
    "visurf": Method(
        "as dive_k, with the truth among every group's completions", truth_rollout=True
    ),
    "contrast": Method(
        "as dive_k, each question also on an image of the class that it is confused with",
        answer="contrast",
        pairs=True,
    ),
    "caption": Method(
        "as dive_k, describing the image before reasoning about it",
        prompt_style="caption",
    ),
    "direct": Method("as dive_k, answering without a thought", prompt_style="direct"),
}
# The descriptions of the graph's parameters.
METHOD_HELP = f"what the policy is trained with, one of {', '.join(METHOD_NAMES)}"
SEED_HELP = "the seed of all that is drawn: splits, samples, questions and their order"


def method_of(name: str) -> Method:
    """The method of this name. zero_shot has DiVE-k's settings, and is never trained.

    Raises SettingsError for an unknown name.
    """
    if name == ZERO_SHOT:
        return METHODS["dive_k"]
    if name not in METHODS:
        raise SettingsError(f"unknown method {name!r}{nearest(name, METHOD_NAMES)}")
    return METHODS[name]


def num_rounds(name: str, rounds: int) -> int:
    """The number of rounds in which a method trains; `rounds` is that of [run]."""
    return rounds if method_of(name).refreshes else 1
