"""A report's texts: labels, formatted numbers, escaping, the verdict, and the terminal summary.

The module needs the standard library and the contents of `metrics.json` alone, so that the result of
a finished run prints at once.
"""

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LABELS = {
    "zero_shot": "base policy",
    "dive_k": "DiVE-k",
    "virft": "ViRFT",
    "virft_compat": "ViRFT (as published)",
    "ttrv": "TTRV (no labels)",
    "dive_k_majority": "DiVE-k (majority vote)",
    "sft": "supervised",
    "random_mcq": "random options",
    "text_mcq": "alike in name",
    "visurf": "truth as rollout",
    "contrast": "contrast pairs",
    "caption": "caption first",
    "direct": "answer only",
    "one_step": "one step",
    "two_step": "two steps",
    "majority": "majority vote",
    "mcq": "truth among options",
    "constrained": "letters only",
}
# The order in which modes stand in every table.
ORDER_OF_MODES = ("one_step", "two_step", "adaptive", "majority", "mcq", "constrained")
_DIRECTION_OVERRIDES = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
# The verdict mentions these modes; the tables show all of them.
SPOKEN_MODES = {"one_step": "Asked once", "two_step": "Asked in two steps"}


def label(name: str) -> str:
    """The name of a method, mode or column on pages and in summaries; a mark in parentheses stays."""
    plain, bracket, mark = name.partition(" (")
    return LABELS.get(plain, plain.replace("_", " ")) + bracket + mark


def title_of(name: str) -> str:
    """A label with a capital letter at its start."""
    text = label(name)
    return text[:1].upper() + text[1:]


def in_order(modes: Iterable[str]) -> list[str]:
    """The distinct modes in the order of the tables; unknown ones come last."""
    present = set(modes)
    return [mode for mode in ORDER_OF_MODES if mode in present] + sorted(
        present - {*ORDER_OF_MODES}
    )


def esc(value: object) -> str:
    """Any value as HTML text or attribute, safe and visible whatever a model or a file wrote.

    Control characters, lone surrogates, noncharacters and marks that reverse the writing direction
    could break the file or disguise a text, so each becomes U+FFFD.
    """
    text = str(value)
    if text.isprintable():
        return html.escape(text, quote=True)
    text = text.replace("\r\n", "\n")
    shown = (c if c in "\n\t" or not _unprintable(c) else "\ufffd" for c in text)
    return html.escape("".join(shown), quote=True)


def _unprintable(character: str) -> bool:
    noncharacter = ord(character) & 0xFFFE == 0xFFFE or "\ufdd0" <= character <= "\ufdef"
    if noncharacter or unicodedata.category(character) in ("Cc", "Cs"):
        return True
    return unicodedata.bidirectional(character) in _DIRECTION_OVERRIDES


def percent(share: float | None) -> str:
    """0.642 -> "64.2"."""
    return "–" if share is None else f"{100 * share:.1f}"


def points(difference: float | None) -> str:
    """0.094 -> "+9.4", in percentage points."""
    return "–" if difference is None else f"{100 * difference:+.1f}"


def p_value(p: float) -> str:
    """0.0312 -> "0.031"; "<0.001" for a smaller value."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def signs(text: str) -> str:
    """The text with real minus signs, for pages; the terminal's texts keep their hyphens."""
    return text.replace("-", "−")


def mark(seen: Mapping[str, int]) -> str:
    """What stands beside the name of a policy that saw more than base train images; else "".

    `seen` has the numbers of images that it was trained on: `evaluated` of those that it is measured
    on, and `novel` of novel classes.
    """
    if seen.get("evaluated"):
        return "TRAINED ON THE TEST IMAGES"
    return "saw novel images" if seen.get("novel") else ""


def marked(name: str, seen: Mapping[str, int]) -> str:
    """A policy's name with its mark, if it has one."""
    return f"{name} ({told})" if (told := mark(seen)) else name


def warning(seen: Mapping[str, int], name: str) -> str:
    """The sentence at the top of a page for the policy `name` with such a mark; "" without one."""
    if seen.get("evaluated"):
        return (
            f"TRAINED ON THE TEST IMAGES: {name} was trained, without labels, on {seen['evaluated']:,} of the "
            "images that it is measured on. Its figures say nothing about new images, and must not stand "
            "beside those of methods that never saw them."
        )
    if seen.get("novel"):
        return (
            f"Novel images seen: {name} was trained, without labels, on {seen['novel']:,} images of novel "
            "classes. To the other methods these classes are new."
        )
    return ""


def summary(metrics: dict) -> str:
    """The result as a plain-text table and verdict, from the contents of `metrics.json` alone."""
    first, *others = metrics["evaluations"]
    counts = " and ".join(f"{n:,} {group}" for group, n in metrics["images"]["groups"].items())
    parts = " and ".join(metrics["images"]["in_split"])  # "test", or "val" while tuning
    seen = metrics.get("seen", {})
    told = warning(seen, label(others[0]["name"])) if others else ""
    lines = [told, ""] if told else []
    lines += [f"{metrics['card']['name']}: {counts} {parts} images; accuracy in %, 95 % intervals"]
    for other in others or [None]:
        columns = ["", label(first["name"])]
        if other:
            columns += [marked(label(other["name"]), seen), "paired difference"]
        rows = [columns]
        for mode in metrics["modes"]:
            rows.append([label(mode)])
            rows += [
                _summary_row(key, mode, first, other)
                for key in (*metrics["images"]["groups"], "harmonic_mean")
                if key in first["modes"][mode]
            ]
        lines += ["", *_align(rows)]
    headline, details = verdict(metrics)
    return "\n".join([*lines, "", headline, *([_seed_note()] if details else [])])


def verdict(metrics: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Whether the second evaluation beats the first: (headline, one sentence for each mode).

    A change counts only when the 95 % interval of the paired difference excludes zero.
    """
    first, *others = metrics["evaluations"]
    if not others:
        return f"Only the {label(first['name'])} was evaluated: there is nothing to compare.", []
    name = label(others[0]["name"])
    modes = [m for m in SPOKEN_MODES if "difference" in others[0]["modes"].get(m, {})]
    modes = modes or [m for m, f in others[0]["modes"].items() if "difference" in f][:1]
    if not modes:
        return f"{name} and the {label(first['name'])} were not evaluated in the same mode.", []
    groups = list(metrics["images"]["groups"])
    claims = [_claim(others[0]["modes"][mode]["difference"], groups) for mode in modes]
    if len(set(claims)) == 1:
        headline = f"{name} {claims[0]}."
    else:
        parts = [f"in {label(m)} it {c}" for m, c in zip(modes, claims, strict=True)]
        headline = f"{name}: {'; '.join(parts)}."
    return headline, [_detail(mode, first, others[0], groups) for mode in modes]


def _claim(difference: dict[str, Any], groups: list[str]) -> str:
    kinds: dict[str, list[str]] = {"helped": [], "did worse": [], "may be chance": []}
    for group in groups:
        low, high = difference[group]["interval"]
        kind = "helped" if low > 0 else "did worse" if high < 0 else "may be chance"
        kinds[kind].append(group)
    if len(kinds["may be chance"]) == len(groups):
        return "made no clear difference"
    claims = [
        f"{kind} on {' and '.join(groups_of)} classes"
        for kind, groups_of in kinds.items()
        if groups_of and kind != "may be chance"
    ]
    open_groups = kinds["may be chance"]
    tail = f"; on {open_groups[0]} classes the change may be chance" if open_groups else ""
    return " and ".join(claims) + tail


def _detail(mode: str, first: dict, other: dict, groups: list[str]) -> str:
    clauses = []
    for index, group in enumerate(groups):
        before, after = (e["modes"][mode][group]["accuracy"] for e in (first, other))
        change = other["modes"][mode]["difference"][group]
        mean, low, high = (signs(points(x)) for x in (change["mean"], *change["interval"]))
        sure = f"{mean} points, 95\xa0% interval {low} to {high}" if index == 0 else None
        course = "as before," if after == before else "up from" if after > before else "down from"
        clauses.append(
            f"{percent(after)}\xa0% of {group} images, {course} {percent(before)}\xa0% "
            f"({sure or f'{mean}, {low} to {high}'})"
        )
    return f"{SPOKEN_MODES.get(mode, label(mode))}, it is right on {', and on '.join(clauses)}."


def _seed_note() -> str:
    return "The intervals are for the draw of test images; another training seed may differ."


def _summary_row(key: str, mode: str, first: dict, other: dict | None) -> list[str]:
    cells = [f"  {label(key)}"]
    for item in (first, other) if other else (first,):
        figures = item["modes"].get(mode, {}).get(key)
        cells.append(_cell(figures["accuracy"], figures) if figures else "–")
    if other:
        change = other["modes"].get(mode, {}).get("difference", {}).get(key)
        cells.append(_cell(change["mean"], change, points) if change else "–")
    return cells


def _cell(value: float, figures: dict, form: Any = percent) -> str:
    low, high = figures["interval"]
    return f"{form(value):>5} [{form(low)}, {form(high)}]"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    columns = max(map(len, rows))
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(columns)]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows
    ]
