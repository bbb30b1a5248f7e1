"""The report's gallery: test images that were won, lost, or wrong both times, side by side.

Nothing is picked by hand: within each kind the images stand in the order of a hash of their id,
base and novel in turn, so a gallery shows the common case and never the flattering one.
"""

import base64
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from data_cards import Card
from tasks import shards
from tasks.candidates import merge
from tasks.labels import ClassNames
from tasks.prompts import LETTERS
from tasks.report_text import esc, label

PAIRED = {
    "won": ("Won", "wrong before, right after"),
    "lost": ("Lost", "right before, wrong after"),
    "wrong": ("Wrong both times", "what is still too hard"),
}
ALONE = {"right": ("Right", "by the base policy"), "wrong": ("Wrong", "by the base policy")}
IN_SIGHT = 3  # of each kind; the rest show on demand
PIXELS = 304  # twice the width shown, for fine screens
SHORT_TEXT = 240  # characters; a longer completion unfolds
LONG_TEXT = 6000
Answers = Mapping[str, dict[str, Any]]  # one image's rows of predictions, by mode


@dataclass(frozen=True)
class Shown:
    """One image of the gallery; `answers` runs in parallel to the evaluations compared."""

    image_id: str
    kind: str
    answers: tuple[Answers, ...]


@dataclass(frozen=True)
class Gallery:
    """What is shown, of how many of each kind, and the mode that decided on right and wrong."""

    mode: str
    counts: dict[str, int]
    images: int
    shown: list[Shown]


def choose(predictions: Sequence[list[dict]], size: int) -> Gallery:
    """About `size` images, a fair share of each kind, from the first two evaluations."""
    tables = [_by_image(rows) for rows in predictions[:2]]
    modes = set.intersection(*({row["mode"] for row in rows} for rows in predictions[:2]))
    mode = "two_step" if "two_step" in modes else next(m for m in sorted(modes, reverse=True))
    kinds = PAIRED if len(tables) == 2 else ALONE
    found: dict[str, dict[str, list[str]]] = {kind: defaultdict(list) for kind in kinds}
    counts: Counter[str] = Counter()
    for image_id in sorted(tables[0], key=_draw):
        kind = _kind([bool(table[image_id][mode]["correct"]) for table in tables])
        if kind in found:
            counts[kind] += 1
            found[kind][tables[0][image_id][mode]["group"]].append(image_id)
    queues = {kind: _in_turn(groups) for kind, groups in found.items()}
    share = size // len(kinds)
    spare = size - sum(min(share, len(queue)) for queue in queues.values())
    shown = []
    for kind, queue in queues.items():
        extra = min(spare, max(0, len(queue) - share))
        spare -= extra
        for image_id in queue[: share + extra]:
            shown.append(Shown(image_id, kind, tuple(table[image_id] for table in tables)))
    return Gallery(mode, {kind: counts[kind] for kind in kinds}, len(tables[0]), shown)


def gallery_html(
    gallery: Gallery,
    names: Sequence[str],
    images: Mapping[str, bytes],
    votes: Sequence[Mapping[str, Mapping[str, int]]],
    places: Mapping[str, dict],
    classes: Mapping[int, str],
) -> str:
    """The gallery as HTML.

    `names` are the two evaluations'; `images` the encoded bytes and `votes` the votes by class
    name, both by image id; `places` the rows of the split; `classes` the class names by id.
    """
    kinds = PAIRED if len(names) > 1 else ALONE
    parts = [
        f"<p>Sorted by what happened to the answer in the mode “{esc(label(gallery.mode))}”, and "
        "within that by a hash of the image’s id: nobody picked them.</p>",
        _filters(gallery, places, kinds),
    ]
    for kind, (title, meaning) in kinds.items():
        total = gallery.counts[kind]
        mine = [item for item in gallery.shown if item.kind == kind]
        cards = [
            _card(
                item,
                names,
                data_uri(images.get(item.image_id)),
                votes,
                places,
                classes,
                rest=index >= IN_SIGHT,
            )
            for index, item in enumerate(mine)
        ]
        told = f"{meaning}; {len(cards)} of them here" if cards else "there are none"
        hidden = len(cards) - IN_SIGHT
        more = f'<span class="more">, {hidden} more by “all”</span>' if hidden > 0 else ""
        parts.append(
            f'<div data-kind="{kind}"><h3>{title}: {total:,} of {gallery.images:,} images</h3>'
            f'<p class="quiet">{told}{more}</p>{"".join(cards)}</div>'
        )
    return f'<div class="gallery">{"".join(parts)}</div>'


def _filters(gallery: Gallery, places: Mapping[str, dict], kinds: Mapping[str, Any]) -> str:
    """Choices of class, group and kind. The style sheet does the rest, so no script is needed."""
    shown = [places[item.image_id] for item in gallery.shown]
    labels = {place["label"]: place["class_name"] for place in shown}
    groups = dict.fromkeys(sorted(place["group"] for place in shown))
    choices = {
        "class": {str(n): labels[n] for n in sorted(labels, key=lambda n: labels[n])},
        "group": {group: f"{group} classes" for group in groups},
        "kind": {kind: title.lower() for kind, (title, _) in kinds.items()},
    }
    rules, selects = [], []
    for name, values in choices.items():
        options = "".join(f'<option value="{esc(v)}">{esc(t)}</option>' for v, t in values.items())
        selects.append(
            f'<label>{name}<select name="{name}"><option value="">any</option>{options}</select></label>'
        )
        part = "[data-kind]" if name == "kind" else ".shown"
        rules += [
            f'.gallery:has([name={name}]>[value="{v}"]:checked) {part}:not([data-{name}="{v}"])'
            "{display:none}"
            for v in values
        ]
    everything = '<label class="all"><input type="checkbox" name="all">all</label>'
    return (
        f"<style>{''.join(rules)}</style>"
        f'<form autocomplete="off">{"".join(selects)}{everything}</form>'
    )


def sampled_votes(folder: Path, ids: Iterable[str], card: Card) -> dict[str, dict[str, int]]:
    """How many of an image's sampled answers named each class, by image id and class name."""
    names, everything = ClassNames(card.classes, card.aliases), set(range(len(card.classes)))
    sampled: dict[str, list[tuple[str, float]]] = {image_id: [] for image_id in ids}
    if not list(folder.glob("rollouts*.parquet")):
        return {}
    columns = ["image_id", "completion", "mean_logprob"]
    for row in shards.iter_rows(folder, "rollouts", columns, 4096):
        if row["image_id"] in sampled:
            sampled[row["image_id"]].append((row["completion"], row["mean_logprob"] or 0.0))
    return {
        image_id: {
            card.classes[c.class_id]: c.votes for c in merge(rows, names, everything).candidates
        }
        for image_id, rows in sampled.items()
    }


def data_uri(encoded: bytes | None) -> str:
    """A small copy of the image as a data: URI, or "" where it cannot be decoded.

    It is always decoded and encoded anew, so nothing but pixels reaches the page.
    """
    try:
        with Image.open(io.BytesIO(encoded or b"")) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    small = max(picture.size) <= PIXELS // 2
    picture.thumbnail((PIXELS, PIXELS))
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=82)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _card(
    item: Shown,
    names: Sequence[str],
    source: str,
    votes: Sequence[Mapping[str, Mapping[str, int]]],
    places: Mapping[str, dict],
    classes: Mapping[int, str],
    *,
    rest: bool,
) -> str:
    place = places[item.image_id]
    truth = place["class_name"]
    image = f'<img src="{source}" alt="{esc(truth)}">' if source else "<p>no image</p>"
    sides = "".join(
        _side(name, answers, counted.get(item.image_id, {}), truth, classes)
        for name, answers, counted in zip(names, item.answers, votes, strict=False)
    )
    return (
        f'<article class="shown{" rest" * rest}" data-class="{place["label"]}" '
        f'data-group="{esc(place["group"])}"><div class="who">{image}<div><p class="truth">{esc(truth)}</p>'
        f'<p class="quiet">{esc(place["group"])} class<br>{_breakable(item.image_id)}</p>'
        f"</div></div>{sides}</article>"
    )


def _breakable(path: str) -> str:
    return re.sub(r"([/_])", r"\1<wbr>", esc(path))


def _side(
    name: str, answers: Answers, votes: Mapping[str, int], truth: str, classes: Mapping[int, str]
) -> str:
    """What one policy said about one image: each mode's answer, its options, its reasoning."""
    parts = [f'<div class="side"><h4>{esc(label(name))}</h4>']
    for mode, row in answers.items():
        chosen = classes.get(row["class_id"])
        mark = "right" if row["correct"] else "wrong"
        said = esc(chosen) if chosen else f"“{esc(_cut(row['answer'], 80))}”"
        why = "" if chosen else f' <span class="tag">{esc(label(row["status"]))}</span>'
        parts.append(f'<p class="{mark}">{esc(label(mode))}: {said}{why}</p>')
        if row["options"]:
            parts.append(_options(row["options"], chosen, truth, votes))
        parts.append(_said(row["completion"]))
    return "".join([*parts, "</div>"])


def _options(
    options: Iterable[str], chosen: str | None, truth: str, votes: Mapping[str, int]
) -> str:
    items = []
    for letter, option in zip(LETTERS, options, strict=False):
        tags = [
            word for word, on in (("chosen", option == chosen), ("truth", option == truth)) if on
        ]
        tag = f' <span class="tag">({", ".join(tags)})</span>' if tags else ""
        count = votes.get(option, 0 if votes else None)
        vote = "" if count is None else f"{count} vote{'s' * (count != 1)}"
        picked = ' class="picked"' if option == chosen else ""
        items.append(
            f"<li{picked}><span>{letter}</span><span>{esc(option)}{tag}</span>"
            f'<span class="vote">{vote}</span></li>'
        )
    return f'<ul class="options">{"".join(items)}</ul>'


def _said(completion: str) -> str:
    """The completion as it came: in sight when short, to unfold when long."""
    if not completion:
        return ""
    text = f'<pre class="said" tabindex="0">{esc(_cut(completion, LONG_TEXT))}</pre>'
    if len(completion) <= SHORT_TEXT:
        return text.replace(' tabindex="0"', "", 1)
    return f"<details><summary>Reasoning</summary>{text}</details>"


def _cut(text: str, limit: int) -> str:
    rest = len(text) - limit
    return text if rest <= 0 else f"{text[:limit]} … ({rest:,} more characters)"


def _by_image(rows: list[dict]) -> dict[str, dict[str, dict]]:
    table: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        table[row["image_id"]][row["mode"]] = row
    return dict(table)


def _kind(correct: list[bool]) -> str:
    if len(correct) == 1:
        return "right" if correct[0] else "wrong"
    return {(False, True): "won", (True, False): "lost", (False, False): "wrong"}.get(
        (correct[0], correct[1]), "right"
    )


def _in_turn(groups: Mapping[str, list[str]]) -> list[str]:
    rows = zip_longest(*(groups[group] for group in sorted(groups)))
    return [image_id for image_id in chain.from_iterable(rows) if image_id is not None]


def _draw(image_id: str) -> bytes:
    return hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).digest()
