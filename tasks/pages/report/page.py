"""Builds the report as one HTML file that opens offline: the verdict first, then the evidence.

A strict content security policy allows images as data: URIs and the page's own style sheet, and
nothing else: no script, no web font. The gallery's filters are style rules. The template is
`report.html.jinja`; this module computes its values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.pages import render
from tasks.pages.compare_sections import THOUGHTS
from tasks.pages.figures import Figure
from tasks.pages.report.changes import (
    class_table,
    confusion_tables,
    cross_table,
    refresh_changes,
)
from tasks.pages.report.figures import policies
from tasks.pages.report.lineage import graph_svg
from tasks.pages.report.tables import (
    budget_table,
    judged_pass_table,
    judged_table,
    near_table,
    pseudo_label_rows,
    refresh_table,
    results_table,
    stages_table,
    status_list,
    thought_table,
)
from tasks.pages.report.training_log import FIRST
from tasks.pages.text import SPOKEN_MODES, label, verdict, warning


def build_page(
    metrics: Mapping[str, Any],
    figures: Mapping[str, Sequence[Figure]],
    gallery: Mapping[str, Any],
    command: str,
) -> str:
    """The page as HTML.

    `figures` has the keys `accuracy`, `pass`, `budget`, `rounds`, `log` and `changes`. `gallery` is the result
    of `gallery_values`, and `command` the command line that makes the report again.
    """
    card = metrics["card"]
    method = metrics["evaluations"][min(1, len(metrics["evaluations"]) - 1)]["name"]
    headline, details = verdict(metrics)
    return render(
        "report.html.jinja",
        title=f"{label(method)} on {card['name']}",
        warning=warning(metrics.get("seen", {}), label(method)),
        headline=headline,
        details=details,
        tiles=_tiles(metrics),
        drawn_images=card["source_kind"] == "drawn",
        base_policy_note=metrics["base_policy_note"],
        figures=figures,
        policies=policies(metrics["evaluations"]),
        images=_images(metrics["images"]),
        results=results_table(metrics),
        judged=judged_table(metrics),
        judged_pass=judged_pass_table(metrics),
        cross=cross_table(metrics["cross"]),
        statuses=status_list(metrics),
        budget=budget_table(metrics["evaluations"]),
        near=near_table(metrics["evaluations"]),
        thoughts=thought_table(metrics["evaluations"]),
        about_thoughts=THOUGHTS,
        training=_training(metrics, figures),
        changed=_changes(metrics, figures["changes"]),
        gallery=gallery,
        command=command,
        graph=graph_svg(metrics["stages"]),
        stages=stages_table(metrics["stages"]),
        footer=_footer(metrics),
    )


def _tiles(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The differences in big figures: base, novel, harmonic mean, asked once (or as it was asked)."""
    if len(metrics["evaluations"]) < 2:
        return {}
    first, other = metrics["evaluations"][:2]
    modes = [m for m in (*SPOKEN_MODES, *metrics["modes"]) if m in other["modes"]]
    if not modes or "difference" not in other["modes"][modes[0]]:
        return {}
    mode = modes[0]
    rows = []
    for key, change in other["modes"][mode]["difference"].items():
        before, after = (e["modes"][mode][key]["accuracy"] for e in (first, other))
        rows.append({"key": key, "change": change, "before": before, "after": after})
    return {"mode": mode, "rows": rows}


def _images(images: Mapping[str, Any]) -> str:
    """How many images the figures are over, in words."""
    counts = " and ".join(
        f"{n:,} images of {images['classes'].get(group, 0)} {group} classes"
        for group, n in images["groups"].items()
    )
    if set(images["in_split"]) == {"val"}:
        return f"{counts} (validation images, not test images)"
    if len(images["in_split"]) > 1:
        of_parts = (f"{n:,} of the {part} images" for part, n in images["in_split"].items())
        return f"{counts} ({' and '.join(of_parts)} of the split)"
    left_out = images["test_images_in_all"] - images["in_split"].get("test", 0)
    if left_out > 0:
        return f"{counts} ({left_out:,} test images of the split were not evaluated)"
    return counts


def _training(
    metrics: Mapping[str, Any], figures: Mapping[str, Sequence[Figure]]
) -> dict[str, Any]:
    """How training went; empty where nothing was trained."""
    first = [figure for figure in figures["log"] if figure.title in FIRST]
    values = {
        "figures": [*figures["pass"], *first, *figures["rounds"]],
        "more_of_the_log": [figure for figure in figures["log"] if figure.title not in FIRST],
        "refreshes": refresh_changes(metrics["rounds"]),
        "rounds": refresh_table(metrics["rounds"]),
        "pseudo_labels": pseudo_label_rows(metrics["rounds"]),
    }
    return values if any(values.values()) else {}


def _changes(metrics: Mapping[str, Any], figures: Sequence[Figure]) -> dict[str, Any]:
    """What training changed; empty where there is nothing to compare with."""
    confusions = metrics.get("confusions") or {}
    names = [e["name"] for e in metrics["evaluations"][:2]]
    values = {
        "figures": figures,
        "traits": metrics["traits"],
        "confusions": confusion_tables(confusions),
        "classes": class_table(metrics["classes"], names, confusions.get("mode", "")),
    }
    return {"names": names, **values} if any(values.values()) else {}


def _footer(metrics: Mapping[str, Any]) -> str:
    card, duplicates = metrics["card"], metrics["images"].get("duplicates", {})
    sentences = (
        f"Images: data card {card['name']}, version {card['version']}, licence {card['license']}."
    )
    if not card["redistribute"]:
        sentences += " They may not be passed on, so keep this page to yourself."
    for pair, count in duplicates.items():
        sentences += f" {count:,} images: {pair} (duplicates.parquet of Split)."
    return sentences
