"""Predicts the classes of images with a trained policy, from Python.

    from tasks.predict import Predictor

    with Predictor("artifacts/beetles/dive_k/round1/train/current") as predictor:
        for prediction in predictor.predict(["one.jpg", "two.jpg"]):
            print(prediction.answer, prediction.confidence)

The command line is `python -m pipeline predict`. Engines, prompts, candidates and parsing are those
of Evaluate. The engine runs in this process, on a GPU or a CPU.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from data_cards import Card
from tasks.engines import adapters, policies
from tasks.engines.backends import open_engine
from tasks.engines.base import Completion, Engine, Request
from tasks.engines.refusals import Enough, check_prompt, generate_in_instalments
from tasks.engines.sampler import sampling_of
from tasks.engines.settings import EngineSettings
from tasks.evaluation import adaptive
from tasks.evaluation.modes import (
    Reading,
    choice_queries,
    option_names,
    proposed_options,
    read_choice,
    read_majority,
    read_open,
    vote_share,
)
from tasks.evaluation.prediction import Prediction, Source, card_for, engine_settings, read_image
from tasks.evaluation.settings import PredictSettings
from tasks.ingest.pictures import Picture, Reject
from tasks.language import answers, prompts
from tasks.language.class_names import ClassNames
from tasks.language.taxonomy import Taxonomy
from tasks.questions.candidates import Votes, merge
from tasks.questions.options import Option
from tasks.runtime.waiting import opening
from tasks.tables.pixels import Decoder
from tasks.tables.shards import chunks

BATCH = 32  # images in a batch
SHOWN_ANSWERS = 5  # answers without a class that a prediction lists


class Predictor:
    """Asks a policy about images. Close it, or use it in a `with` statement.

    `policy` is a folder, an artifact, or a model of the hub. The possible answers are those of `card`
    (a name or a Card), or the names in `classes`, with `noun` and `kind` for the wording of the
    question, or else those of the card that the policy was trained on. `engine` defaults to
    `tasks.evaluation.prediction.engine_settings`. Raises StageError when the policy or the card cannot
    be used.
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
        self.card = card_for(card, classes, noun, kind, self.policy)
        policies.check_words(policies.special_tokens(self.policy), self.card)
        self.engine_settings = engine or engine_settings(self.policy)
        self.settings = settings or PredictSettings()
        self._adapts = (
            adaptive.of_prediction(self.settings) if self.settings.mode == "adaptive" else None
        )
        self._names = ClassNames.of(self.card)
        self._taxonomy = Taxonomy.of(self.card)
        self._before, self._text = prompts.card_question(
            self.card,
            self.settings.prompt,
            list(self.card.classes),
            style=self.engine_settings.prompt_style,
            list_position=self.engine_settings.list_position,
            one_step=self.settings.mode == "one_step",
        )
        self._batches = 0
        self._engine: Engine | None = None
        self._scratch: TemporaryDirectory[str] | None = None  # of a LoRA policy's merged weights

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the engine."""
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
        """The predictions batch by batch, as soon as they are made, for paths, bytes or pictures."""
        for batch in chunks(list(enumerate(images)), BATCH):
            names = [_name(image, number) for number, image in batch]
            read = [read_image(image) for _, image in batch]
            data = {
                key: picture.data
                for key, picture in enumerate(read)
                if isinstance(picture, Picture)
            }
            answered = self._answers(data, names) if data else {}
            for key, picture in enumerate(read):
                if isinstance(picture, Reject):
                    yield Prediction(names[key], status="unreadable", error=str(picture))
                else:
                    yield answered[key]

    def _answers(self, images: dict[int, bytes], names: list[str]) -> dict[int, Prediction]:
        if self._engine is None:
            policy = self._weights()
            with opening("predict", policy, self.engine_settings.backend):
                self._engine = open_engine(policy, self.engine_settings)
                check_prompt(self._engine, list(self._requests(images).values()))
        requests = self._requests(images)
        refused: dict[str, str] = {}
        once, adapts = self.settings.mode == "one_step", self._adapts
        classes = frozenset(range(len(self.card.classes)))
        keys = dict.fromkeys(map(str, requests), classes)
        enough = adapts.enough(self._names, keys) if adapts else None
        self._batches += 1
        sampled = self._generate(list(requests.values()), refused, greedy=once, enough=enough)
        if once:
            return {
                key: self._one_step(names[key], sampled[str(key)][0], refused.get(str(key), ""))
                for key in requests
            }
        votes = {
            key: merge(
                [(each.text, each.mean_logprob) for each in sampled[str(key)]],
                self._names,
                set(classes),
            )
            for key in requests
        }
        most = self.settings.num_options
        options = {
            str(key): proposed_options(
                of_image,
                adaptive.num_options(of_image, most, adapts.thresholds) if adapts else most,
                self.settings.seed,
                names[key],
            )
            for key, of_image in votes.items()
        }
        queries = choice_queries(options, self.card, self.engine_settings.prompt_style)
        second = [replace(requests[int(q.image_id)], text=q.text, before="") for q in queries]
        choices = self._generate(second, refused, greedy=True) if second else {}
        return {
            key: self._two_step(
                names[key],
                sampled[str(key)],
                votes[key],
                options[str(key)],
                choices.get(str(key), [None])[0],
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
        if self.engine_settings.backend == "server" or not adapters.adapter_stack(self.policy):
            return self.policy
        self._scratch = TemporaryDirectory(prefix="policy-")
        return adapters.merged_weights(self.policy, Path(self._scratch.name))

    def _generate(
        self,
        requests: list[Request],
        refused: dict[str, str],
        *,
        greedy: bool,
        enough: Enough | None = None,
    ) -> dict[str, list[Completion]]:
        assert self._engine is not None
        n, seed, batch = self.settings.num_rollouts, self.settings.seed, self._batches - 1
        sampling = sampling_of(self.engine_settings, n, seed, batch, greedy)
        answered = generate_in_instalments(self._engine, requests, sampling, refused, enough)
        return {request.key: row for request, row in zip(requests, answered, strict=True)}

    def _one_step(self, name: str, completion: Completion, error: str) -> Prediction:
        reading = read_open(completion.text, self._names, self._taxonomy)
        others = [(reading.answer, 1)] if reading.answer and reading.class_id is None else []
        return self._prediction(
            name,
            reading,
            reasoning=answers.reasoning(completion.text),
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
        choice: Completion | None,
        error: str,
    ) -> Prediction:
        reading = (
            read_majority(votes, self.card)
            if self._adapts and len(options) < 2
            else read_choice(choice.text if choice else None, options, self.card)
        )
        completions = [*sampled, choice] if choice else sampled
        others = [(a.text, a.votes) for a in votes.answers if a.class_id < 0 and a.text]
        return self._prediction(
            name,
            reading,
            reasoning=answers.reasoning(choice.text)
            if choice
            else self._best_thought(sampled, reading),
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
        """The thought of the likeliest sample that agrees with the answer."""
        agreeing = [
            each
            for each in sampled
            if reading.class_id is not None
            and read_open(each.text, self._names).class_id == reading.class_id
        ]
        best = max(agreeing, key=lambda each: each.mean_logprob, default=None)
        return answers.reasoning(best.text) if best else ""

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


def _name(image: Source, number: int) -> str:
    return str(image) if isinstance(image, str | Path) else f"image {number}"
