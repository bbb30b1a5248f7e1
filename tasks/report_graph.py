"""The graph of artifacts that a result rests on, drawn from their manifests as inline SVG.

A stage stands below everything it was made from; edges that a longer way already says are left
out, so that the line through the rounds can be seen.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.report_text import esc, label

WIDTH, BOX, HIGH, STEP = 350.0, 182.0, 38.0, 62.0


def graph_svg(stages: Sequence[Mapping[str, Any]]) -> str:
    """The graph as an SVG element; "" when no manifest names its inputs."""
    known = {str(s["fingerprint"]): s for s in stages if s.get("fingerprint")}
    inputs = {
        mark: {str(i) for i in (stage.get("inputs") or {}).values()} & known.keys()
        for mark, stage in known.items()
    }
    if not any(inputs.values()):
        return ""
    depth = _depths(inputs)
    layers: dict[int, list[str]] = defaultdict(list)
    for mark in known:
        layers[depth[mark]].append(mark)
    wide = max(len(layer) for layer in layers.values())
    width = max(WIDTH, wide * (BOX + 14))
    place = {
        mark: ((index + 0.5) * width / len(layer), 6 + level * STEP)
        for level, layer in layers.items()
        for index, mark in enumerate(layer)
    }
    height = 12 + (max(layers) + 1) * STEP - (STEP - HIGH)
    edges = "".join(
        _edge(*place[needed], *place[mark])
        for mark, needs in _shortest(inputs).items()
        for needed in sorted(needs)
    )
    boxes = "".join(_box(*place[mark], stage) for mark, stage in known.items())
    told = f"{len(known)} artifacts in {len(layers)} layers, each below what it was made from"
    return (
        f'<svg class="graph" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'style="max-width:{width / 16:.1f}rem" aria-labelledby="graph-t graph-d">'
        f'<title id="graph-t">The graph of artifacts</title><desc id="graph-d">{told}</desc>'
        f"{edges}{boxes}</svg>"
    )


def stage_name(stage: Mapping[str, Any]) -> str:
    """Train, DiVE-k, round 1."""
    settings = stage.get("settings") or {}
    about = []
    method = settings.get("method") or stage.get("method")
    if method:
        about.append(label(str(method)))
    round_ = settings.get("refresh_round", stage.get("refresh_round"))
    if round_ is not None and method != "zero_shot":
        about.append(f"round {round_}")
    return ", ".join([str(stage.get("stage", "?")), *about])


def _depths(inputs: Mapping[str, set[str]]) -> dict[str, int]:
    """The longest way down to each; what a manifest names in a circle (it cannot) stays on top."""
    depth = dict.fromkeys(inputs, 0)
    for _ in inputs:
        for mark, needs in inputs.items():
            depth[mark] = min(len(inputs), max((depth[n] + 1 for n in needs), default=0))
    return depth


def _shortest(inputs: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The edges that no longer way replaces."""
    above: dict[str, set[str]] = {}

    def ancestors(mark: str) -> set[str]:
        if mark not in above:
            above[mark] = set()
            above[mark] = set(inputs[mark]).union(*(ancestors(n) for n in inputs[mark]))
        return above[mark]

    return {
        mark: {n for n in needs if not any(n in ancestors(m) for m in needs if m != n)}
        for mark, needs in inputs.items()
    }


def _edge(x1: float, y1: float, x2: float, y2: float) -> str:
    start, end = y1 + HIGH, y2
    bend = min(STEP, (end - start) * 0.7)
    curve = f"C{x1:.1f} {start + bend:.1f} {x2:.1f} {end - bend:.1f} {x2:.1f} {end:.1f}"
    return f'<path class="edge" d="M{x1:.1f} {start:.1f}{curve}"/>'


def _box(x: float, y: float, stage: Mapping[str, Any]) -> str:
    left = x - BOX / 2
    mark = str(stage.get("fingerprint", ""))[:10]
    return (
        f'<rect class="box" x="{left:.1f}" y="{y:.1f}" width="{BOX:g}" height="{HIGH:g}" rx="5"/>'
        f'<text class="row mid" x="{x:.1f}" y="{y + 16:.1f}">{esc(stage_name(stage)[:30])}</text>'
        f'<text class="mono mid" x="{x:.1f}" y="{y + 31:.1f}">{esc(mark)}</text>'
    )
