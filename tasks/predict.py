"""A policy in use: what do these images show?

    from tasks.predict import Predictor

    with Predictor("artifacts/beetles/dive_k/round1/train/current") as predictor:
        for found in predictor.predict(["one.jpg", "two.jpg"]):
            print(found.answer, found.confidence)

On the command line it is `python -m pipeline predict`. Engine, prompts, merging and reading are those
of Evaluate; the engine runs in this process, on a GPU or without.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from data_cards import Card
from tasks.engines import adapters, policies
from tasks.engines.backends import open_engine
from tasks.engines.base import Completion, Engine, Request
from tasks.engines.sampler import sampling_of
from tasks.engines.settings import EngineSettings
from tasks.engines.worker import ask
from tasks.evaluation.inputs import Source, chosen_card, engine_settings, read_image
from tasks.evaluation.modes import (
    Reading,
    choice_asks,
    option_names,
    proposed_options,
    read_choice,
    read_open,
    vote_share,
)
from tasks.evaluation.settings import PredictSettings
from tasks.ingest.pictures import Picture, Reject
from tasks.language import answers, prompts
from tasks.language.class_names import ClassNames
from tasks.questions.candidates import Votes, merge
from tasks.questions.options import Option
from tasks.runtime.waiting import opening
from tasks.tables.pixels import Decoder
from tasks.tables.shards import chunks

BATCH = 32  # images asked at a time
SHOWN_ANSWERS = 5  # of those that name no class


@dataclass(frozen=True)
class Prediction:
    """What a policy says about one image.

    `answer` is the class named, "" for none, and `class_id` its place in the list of classes; `text`
    is what the answer said.
    `confidence` is the share of the samples that named it (None in one step, where there is one).
    `candidates` are (name, votes) by falling votes, `other_answers` (text, votes) what names no
    class, `options` what the second step chose from, "" in `letter` where it was not needed.
    `reasoning` is the thought that led to the answer. `status` says how it was read, or why there
    is none; `error` why the image could not be asked about, "" for all others. `cut` counts answers
    that ended at max_new_tokens.
    """

    image: str
    answer: str = ""
    class_id: int | None = None
    text: str = ""
    confidence: float | None = None
    status: str = ""
    candidates: list[tuple[str, int]] = field(default_factory=list)
    num_rollouts: int = 0
    num_unparsed: int = 0
    other_answers: list[tuple[str, int]] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    letter: str = ""
    reasoning: str = ""
    completion: str = ""
    cut: int = 0
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            **asdict(self),
            "candidates": [{"name": name, "votes": votes} for name, votes in self.candidates],
            "other_answers": [{"text": text, "votes": n} for text, n in self.other_answers],
        }


class Predictor:
    """Asks a policy about images. Close it, or use it in a `with` statement.

    `policy` is a folder, an artifact, or a model of the hub. What an image may show is said by
    `card` (a name or a Card) or `classes` (names; `noun` and `kind` word the question); without
    either by the card that the policy was trained on. Without `engine` it is
    `tasks.evaluation.inputs.engine_settings`: what suits the policy and the machine. Raises
    StageError when the policy or the card cannot be used.
    """

    def __init__(
        self,
        policy: str | Path,
        card: str | Card | None = None,
        *,
        classes: Sequence[str] | None = None,
        noun: str = "object",
        kind: str = "kind",
        engine: EngineSettings | None = None,
        settings: PredictSettings | None = None,
    ):
        self.policy = policies.local(policy, engine.backend if engine else "")
        self.card = chosen_card(card, classes, noun, kind, self.policy)
        self.engine_settings = engine or engine_settings(self.policy)
        self.settings = settings or PredictSettings()
        self._names = ClassNames(self.card.classes, self.card.aliases)
        self._before, self._text = prompts.card_question(
            self.card,
            self.settings.prompt,
            list(self.card.classes),
            style=self.engine_settings.prompt_style,
            list_position=self.engine_settings.list_position,
        )
        self._batches = 0
        self._engine: Engine | None = None
        self._scratch: TemporaryDirectory[str] | None = None  # of an adapter's weights, made whole

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the engine."""
        if self._engine is not None and hasattr(self._engine, "close"):
            self._engine.close()
        self._engine = None
        if self._scratch is not None:
            self._scratch.cleanup()
        self._scratch = None

    def predict(self, images: Sequence[Source]) -> list[Prediction]:
        """One prediction for each image, in order."""
        return list(self.stream(images))

    def stream(self, images: Sequence[Source]) -> Iterator[Prediction]:
        """The same, batch by batch as they are answered; `images` may be paths, bytes or pictures."""
        for batch in chunks(list(enumerate(images)), BATCH):
            names = [_name(image, number) for number, image in batch]
            read = [read_image(image) for _, image in batch]
            found = {
                key: picture.data
                for key, picture in enumerate(read)
                if isinstance(picture, Picture)
            }
            said = self._answers(found, names) if found else {}
            for key, picture in enumerate(read):
                if isinstance(picture, Reject):
                    yield Prediction(names[key], status="unreadable", error=str(picture))
                else:
                    yield said[key]

    def _answers(self, images: dict[int, bytes], names: list[str]) -> dict[int, Prediction]:
        if self._engine is None:
            policy = self._weights()
            with opening("predict", policy, self.engine_settings.backend):
                self._engine = open_engine(policy, self.engine_settings)
                if hasattr(self._engine, "check"):
                    self._engine.check(self._requests(images)[min(images)])
        requests = self._requests(images)
        refused: dict[str, str] = {}
        two = self.settings.mode == "two_step"
        self._batches += 1
        sampled = self._ask(list(requests.values()), refused, greedy=not two)
        if not two:
            return {
                key: self._one_step(names[key], sampled[str(key)][0], refused.get(str(key), ""))
                for key in requests
            }
        votes = {
            key: merge(
                [(each.text, each.mean_logprob) for each in sampled[str(key)]],
                self._names,
                set(range(len(self.card.classes))),
            )
            for key in requests
        }
        options = {
            str(key): proposed_options(
                votes[key], self.settings.num_options, self.settings.seed, names[key]
            )
            for key in requests
        }
        asks = choice_asks(options, self.card, self.engine_settings.prompt_style)
        second = [replace(requests[int(a.image_id)], text=a.text, before="") for a in asks]
        chosen = self._ask(second, refused, greedy=True) if second else {}
        return {
            key: self._two_step(
                names[key],
                sampled[str(key)],
                votes[key],
                options[str(key)],
                chosen.get(str(key), [None])[0],
                refused.get(str(key), ""),
            )
            for key in requests
        }

    def _requests(self, images: dict[int, bytes]) -> dict[int, Request]:
        decode = getattr(self._engine, "decode", Decoder())
        return {
            key: Request(str(key), data, self._text, self._before, decode=decode)
            for key, data in images.items()
        }

    def _weights(self) -> Path:
        if self.engine_settings.backend == "server" or not adapters.adapted(self.policy):
            return self.policy
        self._scratch = TemporaryDirectory(prefix="policy-")
        return adapters.whole(self.policy, Path(self._scratch.name))

    def _ask(
        self, requests: list[Request], refused: dict[str, str], *, greedy: bool
    ) -> dict[str, list[Completion]]:
        assert self._engine is not None
        given, batch = self.settings, self._batches - 1
        sampling = sampling_of(self.engine_settings, given.num_rollouts, given.seed, batch, greedy)
        answered = ask(self._engine, requests, sampling, refused)
        return {request.key: found for request, found in zip(requests, answered, strict=True)}

    def _one_step(self, name: str, completion: Completion, error: str) -> Prediction:
        reading = read_open(completion.text, self._names)
        others = [(reading.answer, 1)] if reading.answer and reading.class_id is None else []
        return self._prediction(
            name,
            reading,
            reasoning=thought(completion.text),
            other_answers=others,
            cut=int(completion.finish_reason == "length"),
            error=error,
        )

    def _two_step(
        self,
        name: str,
        sampled: list[Completion],
        votes: Votes,
        options: list[Option],
        chosen: Completion | None,
        error: str,
    ) -> Prediction:
        reading = read_choice(chosen.text if chosen else None, options, self.card)
        completions = [*sampled, chosen] if chosen else sampled
        others = [(a.text, a.votes) for a in votes.answers if a.class_id < 0 and a.text]
        return self._prediction(
            name,
            reading,
            reasoning=thought(chosen.text) if chosen else self._best_thought(sampled, reading),
            confidence=vote_share(votes, reading.class_id),
            candidates=[(self.card.classes[c.class_id], c.votes) for c in votes.candidates],
            num_rollouts=votes.num_rollouts,
            num_unparsed=votes.num_unparsed,
            other_answers=others[:SHOWN_ANSWERS],
            options=option_names(options, self.card) if len(options) > 1 else [],
            cut=Counter(each.finish_reason for each in completions)["length"],
            error=error,
        )

    def _best_thought(self, sampled: list[Completion], reading: Reading) -> str:
        """Where all samples agree, the thought of the likeliest one."""
        agreeing = [
            each
            for each in sampled
            if reading.class_id is not None
            and read_open(each.text, self._names).class_id == reading.class_id
        ]
        best = max(agreeing, key=lambda each: each.mean_logprob, default=None)
        return thought(best.text) if best else ""

    def _prediction(self, name: str, reading: Reading, **facts: Any) -> Prediction:
        return Prediction(
            name,
            answer="" if reading.class_id is None else self.card.classes[reading.class_id],
            class_id=reading.class_id,
            text=reading.answer,
            status="refused" if facts["error"] else reading.status,
            letter=reading.letter,
            completion=reading.completion,
            **facts,
        )


def thought(completion: str) -> str:
    """The reasoning in a completion: its think block, or what stands before the answer."""
    found = answers.parse(completion).thought
    if found is None:
        found = completion.partition("<answer>")[0].replace("<think>", "").replace("</think>", "")
    return found.strip()


def _name(image: Source, number: int) -> str:
    return str(image) if isinstance(image, str | Path) else f"image {number}"
