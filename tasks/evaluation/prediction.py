"""A prediction of `tasks.predict`, and its inputs: engine settings, the card of classes, the pictures.

Where the caller gives none, settings and card come from the recipe.json that the policy was trained
with.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from data_cards import Card, CardError, clean_name, load
from tasks.engines import policies
from tasks.engines.settings import EngineSettings
from tasks.ingest.pictures import Picture, Reject, open_picture, to_rgb
from tasks.language.class_names import ClassNames
from tasks.runtime.errors import StageError
from tasks.runtime.machine import gpus

Source: TypeAlias = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class Prediction:
    """A policy's answer about one image.

    `answer` is the class name, "" for none, `class_id` its index in the list of classes, and `text`
    the answer as the policy wrote it. `confidence` is the share of samples that named the class, None
    in one_step. `candidates` are (name, votes), most votes first; `other_answers` are (text, votes)
    of answers that name no class. `options` are those of the second step, and `letter` its choice,
    "" where the first step sufficed. `reasoning` is the thought before the answer. `status` is how
    the answer was read, or why there is none; `error` is why the image was not asked about, "" if it
    was. `cut` counts the answers that ended at max_new_tokens.
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
        """The fields as plain values, for JSON."""
        return {
            **asdict(self),
            "candidates": [{"name": name, "votes": votes} for name, votes in self.candidates],
            "other_answers": [{"text": text, "votes": n} for text, n in self.other_answers],
        }


def engine_settings(policy: Path) -> EngineSettings:
    """Default `[engine]` settings for a policy: those of its training where they are known."""
    trained = policies.recipe(policy)
    config = json.loads((policy / "config.json").read_text()) if _has_config(policy) else {}
    limit = config.get("text_config", config).get("max_position_embeddings") or 8192
    return EngineSettings(
        prompt_style=trained.get("prompt_style", "stepwise"),
        list_position="in_question",
        dtype="bfloat16" if gpus() else "float32",
        quantization="",
        lora="",
        temperature=1.0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=trained.get("max_completion_length", min(1024, limit // 4)),
        max_pixels=0,
        max_model_len=min(8192, limit),
        max_num_seqs=256,  # moderate, since the policy's size is not known
    )


def _has_config(policy: Path) -> bool:
    return (policy / "config.json").is_file()


def card_for(
    card: str | Card | None, classes: Sequence[str] | None, noun: str, kind: str, policy: Path
) -> Card:
    """The card that lists the possible answers.

    It is `card`, or a new card with the names in `classes`, or else the card that the policy was
    trained on. Raises StageError when there is none of them, or it cannot be used.
    """
    if card is not None and classes is not None:
        raise StageError("give a card or classes, not both")
    if classes is not None:
        names = tuple(filter(None, map(clean_name, classes)))
        try:
            ClassNames(names)
        except ValueError as error:
            raise StageError(f"the classes cannot be told apart: {error}") from error
        if len(names) < 2:
            raise StageError(f"there must be two or more classes; got {len(names)}")
        return Card("classes", 1, noun, kind, {"kind": "given"}, names)
    if isinstance(card, Card):
        return card
    record = policies.artifact(policy)
    trained_on = str(policies.recipe(policy).get("card") or (record.dataset if record else ""))
    if card is None and (not trained_on or "+" in trained_on):
        known = f"; it was trained on {trained_on}" if trained_on else ""
        raise StageError(
            f"say what the images may show: a card or a list of classes (--card, --classes){known}"
        )
    try:
        return load(card or trained_on)
    except CardError as error:
        raise StageError(str(error)) from error


def read_image(image: Source) -> Picture | Reject:
    """The picture as Download would store it, or the reason why it cannot be read."""

    def data() -> bytes:
        if isinstance(image, bytes):
            return image
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            to_rgb(image).save(buffer, "PNG")
            return buffer.getvalue()
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise Reject(error.strerror or str(error)) from error

    return open_picture(data)
