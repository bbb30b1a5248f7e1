"""Report: writes the metrics, the page and the figures of one method on one set.

    python -m tasks.report recipe.json

Everything is computed from artifacts, so a report can be made again without a model. The denominator
of every figure is the set of test images, the same for every policy and every mode, and an
unreadable answer is wrong. Differences are paired image by image. Intervals are 95 %; they hold for
the draw of test images, not for the training seed.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_cards import Card, load
from tasks.engines import policies
from tasks.evaluation import changes, traits
from tasks.evaluation.budget_curve import budget_curve
from tasks.evaluation.near_misses import near_misses
from tasks.pages.example import example_figure
from tasks.pages.figures import Figure, write
from tasks.pages.gallery import choose, gallery_values, sampled_votes
from tasks.pages.report import accuracy
from tasks.pages.report import figures as drawn
from tasks.pages.report.page import build_page
from tasks.pages.report.training_log import log_figures
from tasks.pages.text import summary
from tasks.questions import trained_on
from tasks.runtime.command import main
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tasks.tables.manifest import read_values
from tasks.tables.schemas import GROUPS

__all__ = ["report", "summary"]

GALLERY_SIZE = 48
MANIFEST_KEYS = (
    "stage", "dataset", "method", "refresh_round", "fingerprint", "code_version", "settings", "inputs",
    "seconds", "peak_memory_mb", "rows", "versions", "command", "host",
)  # fmt: skip


class ReportError(StageError, ValueError):
    """Evaluations that cannot be compared; the message names the folder and the reason."""


def report(
    output: Path,
    *,
    card: str,
    evaluations: list[dict],
    rounds: list[dict],
    download: str,
    split: str,
    manifests: list[str],
    cross: list[dict] | None = None,
    judged: list[dict] | None = None,
    command: str = "",
) -> None:
    """Write `metrics.json`, `index.html`, and `figures/` with each figure as SVG, PNG and CSV.

    Args:
        evaluations: the base policy, then the method of the page, then any others; all are compared
            with the first. Each has `name` and `path`.
        rounds: for each round `round` and the folders `propose`, `build_mcq` and `train`.
        cross: evaluations on other sets, each with `trained_on`, `set`, `method` and `path`.
        judged: Judge artifacts, each with the `name` of its evaluation and `path`.
        command: the command line that makes everything again.

    Raises ReportError when two evaluations do not cover the same test images.
    """
    if not evaluations:
        raise ReportError("a report needs at least the evaluation of the base policy")
    split_rows = {row["image_id"]: row for row in shards.read(Path(split), "split").to_pylist()}
    predictions = [_predictions(Path(item["path"]), split_rows) for item in evaluations]
    _check_same_images(evaluations, predictions)
    data_card = load(card)
    logs = [_train_log(entry) for entry in rounds]
    stages = [entry[stage] for entry in rounds for stage in ("build_mcq", "train")]
    metrics: dict[str, Any] = {
        "card": _card_facts(data_card),
        "images": _image_counts(predictions[0], split_rows)
        | {"duplicates": _json(Path(split) / "stats.json").get("duplicates", {})},
        "modes": accuracy.modes_of(predictions[0]),
        "evaluations": [
            {"name": item["name"]}
            | accuracy.compare(rows, predictions[0] if index else None)
            | {"pass_at_k": _json(Path(item["path"]) / "pass_at_k.json")}
            | {"budget_curve": budget_curve(Path(item["path"]), rows, data_card)}
            | {"near_misses": near_misses(rows, data_card)}
            | {"thoughts": _json(Path(item["path"]) / "stats.json").get("thoughts", {})}
            | _judged(item["name"], judged or [], split_rows)
            | {"letters": changes.letters(rows)}
            | {"calibration": changes.calibration(rows)}
            for index, (item, rows) in enumerate(zip(evaluations, predictions, strict=True))
        ],
        **_changed(predictions, data_card),
        "traits": traits.table(predictions[:2], data_card),
        "cross": [_cross(entry) for entry in cross or ()],
        "seen": trained_on.seen(stages, evaluations[0]["path"], split),
        "rounds": [
            _round(entry, log)
            | {"refresh": refresh}
            | {"pseudo_labels": trained_on.pseudo_labels(entry, split_rows, data_card)}
            for entry, log, refresh in zip(rounds, logs, changes.refreshes(rounds), strict=True)
        ],
        "stages": [_stage(Path(path)) for path in manifests],
    }
    made = zip(metrics["stages"], manifests, strict=True)
    bases = [Path(path).parent for stage, path in made if stage.get("stage") == "BasePolicy"]
    metrics["base_policy_note"] = policies.note(bases[0]) if bases else ""
    metrics["seconds"] = sum(stage.get("seconds") or 0 for stage in metrics["stages"])
    chosen = choose(predictions, GALLERY_SIZE)
    ids = [item.image_id for item in chosen.shown]
    gallery = gallery_values(
        chosen,
        [item["name"] for item in evaluations],
        shards.ImageStore(Path(download)).read(ids),
        [sampled_votes(Path(item["path"]), ids, data_card) for item in evaluations[:2]],
        split_rows,
        data_card,
    )
    figures = {
        "accuracy": drawn.accuracy_figures(metrics),
        "pass": drawn.pass_figures(metrics["evaluations"]),
        "budget": _present(drawn.budget_figure(metrics["evaluations"])),
        "rounds": _present(drawn.votes_figure(metrics["rounds"])),
        "log": log_figures(logs, metrics["rounds"]),
        "changes": _present(
            drawn.letter_figure(metrics["evaluations"]),
            drawn.calibration_figure(metrics["evaluations"]),
        ),
    }
    page = build_page(metrics, figures, gallery, command)
    figures["example"] = _present(example_figure(gallery))
    output.mkdir(parents=True, exist_ok=True)
    write((figure for part in figures.values() for figure in part), output)
    (output / "metrics.json").write_text(
        json.dumps(_finite(metrics), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    (output / "index.html").write_text(page, encoding="utf-8")


def _changed(predictions: list[list[dict]], card: Card) -> dict[str, Any]:
    """Confusions and single classes before and after training; empty without a second evaluation."""
    if len(predictions) < 2:
        return {"confusions": {}, "classes": []}
    shared = [
        mode
        for mode in accuracy.modes_of(predictions[0])
        if mode in accuracy.modes_of(predictions[1])
    ]
    mode = shared[0] if shared else ""
    before, after = predictions[:2]
    return {
        "confusions": changes.confusions(before, after, mode, card.classes),
        "classes": changes.by_class(predictions[:2], mode, card.classes),
    }


def _cross(entry: dict) -> dict[str, Any]:
    """The accuracy of one policy on another set, in the first mode of its evaluation."""
    rows = shards.read(Path(entry["path"]), "predictions").to_pylist()
    modes = accuracy.compare(rows, None)["modes"]
    mode = accuracy.modes_of(rows)[0]
    key = "harmonic_mean" if "harmonic_mean" in modes[mode] else next(iter(modes[mode]))
    figure = {"name": entry["method"], "mode": mode, "key": key, "figure": modes[mode][key]}
    return {"trained_on": entry["trained_on"], "set": entry["set"], **figure}


def _judged(name: str, judged: list[dict], split_rows: dict[str, dict]) -> dict[str, Any]:
    """Accuracy and Pass@k with a judge's verdicts; empty where the evaluation `name` was not judged."""
    path = next((Path(item["path"]) for item in judged if item["name"] == name), None)
    if path is None:
        return {"judged": {}, "judged_pass": {}}
    of_samples = accuracy.judged_pass(path, split_rows)
    return {"judged": accuracy.judged(path, split_rows), "judged_pass": of_samples}


def _present(*figures: Figure | None) -> list[Figure]:
    return [figure for figure in figures if figure]


def _predictions(folder: Path, split_rows: dict[str, dict]) -> list[dict]:
    """The predictions of an evaluation, with each image's group of the split."""
    rows = shards.read(folder, "predictions").to_pylist()
    if not rows:
        raise ReportError(f"{folder} holds no predictions; run its Evaluate again")
    for row in rows:
        split_row = split_rows.get(row["image_id"])
        if split_row is None or split_row["split"] in ("train", "pretrain"):
            problem = "not in the split" if split_row is None else f"a {split_row['split']} image"
            raise ReportError(f"{folder} evaluates {row['image_id']!r}, which is {problem}")
        row["group"] = split_row["group"]
    return rows


def _check_same_images(evaluations: list[dict], predictions: list[list[dict]]) -> None:
    """Raise ReportError unless all cover the same images: dropping hard ones would raise a figure."""
    wanted = {row["image_id"] for row in predictions[0]}
    for item, rows in zip(evaluations, predictions, strict=True):
        for mode in accuracy.modes_of(rows):
            ids = Counter(row["image_id"] for row in rows if row["mode"] == mode)
            odd = [f"{i!r} is missing" for i in sorted(wanted - set(ids))]
            odd += [f"{i!r} is extra" for i in sorted(set(ids) - wanted)]
            odd += [f"{i!r} comes {n} times" for i, n in sorted(ids.items()) if n > 1]
            if odd:
                raise ReportError(
                    f"evaluations must cover the same images, but in {item['path']} "
                    f"({item['name']}, {mode}) {odd[0]} ({len(odd)} such images); "
                    f"evaluate all policies on the same split"
                )


def _image_counts(rows: list[dict], split_rows: dict[str, dict]) -> dict[str, Any]:
    groups = {row["image_id"]: row["group"] for row in rows}
    counts = Counter(groups.values())
    return {
        "evaluated": len(groups),
        "groups": {group: counts[group] for group in GROUPS if counts[group]},
        "in_split": dict(Counter(split_rows[image_id]["split"] for image_id in groups)),
        "test_images_in_all": sum(
            split_row["split"] == "test" for split_row in split_rows.values()
        ),
        "classes": dict(
            Counter(g for _, g in {(p["label"], p["group"]) for p in split_rows.values()})
        ),
    }


def _card_facts(card: Card) -> dict[str, Any]:
    facts = {key: getattr(card, key) for key in ("name", "version", "noun", "kind", "license")}
    facts["license"] = card.license_name or card.license
    return facts | {"redistribute": card.redistribute, "source_kind": card.source.get("kind")}


def _train_log(entry: dict) -> list[dict]:
    """The rows of a round's training log by ascending step; empty where nothing was trained."""
    folder = Path(entry.get("train") or "")
    if not entry.get("train") or not (folder / "train_log.parquet").exists():
        return []
    return sorted(shards.read(folder, "train_log").to_pylist(), key=lambda row: row["step"])


def _round(entry: dict, log: list[dict]) -> dict[str, Any]:
    """One round's counts, and means over the first and the last tenth of its training."""
    tenth = max(1, len(log) // 10)
    columns = [key for key in (log[0] if log else {}) if key not in ("step", "seconds")]
    return {
        "round": entry.get("round"),
        "propose": _json(Path(entry["propose"]) / "stats.json") if entry.get("propose") else {},
        "build_mcq": _json(Path(entry["build_mcq"]) / "stats.json")
        if entry.get("build_mcq")
        else {},
        "train": {
            "steps": len(log),
            "seconds": sum(row["seconds"] or 0 for row in log),
            "first": {key: _mean(row[key] for row in log[:tenth]) for key in columns},
            "last": {key: _mean(row[key] for row in log[-tenth:]) for key in columns},
        },
    }


def _stage(path: Path) -> dict[str, Any]:
    """A manifest's values without the checksums; empty where there is no manifest."""
    values = read_values(path) if path.exists() else {}
    return {key: values[key] for key in MANIFEST_KEYS if key in values}


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file, because not every stage writes every one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is not valid JSON ({error}); re-run its stage") from error
    return value if isinstance(value, dict) else {}


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [v for v in values if v is not None and math.isfinite(v)]
    return sum(numbers) / len(numbers) if numbers else None


def _finite(value: Any) -> Any:
    """The same value with null for NaN and infinities, which JSON cannot express."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main(report, short=True)
