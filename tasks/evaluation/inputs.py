"""Prepares the inputs of a prediction: engine settings, the card of classes, the pictures.

Where the caller gives none, settings and card come from the recipe.json that the policy was trained
with.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from data_cards import Card, CardError, clean_name, load
from tasks.engines import policies
from tasks.engines.settings import EngineSettings
from tasks.ingest.pictures import Picture, Reject, open_picture, to_rgb
from tasks.language.class_names import ClassNames
from tasks.runtime.errors import StageError
from tasks.runtime.machine import gpus

Source: TypeAlias = str | Path | bytes | Image.Image


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
