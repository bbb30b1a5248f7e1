"""Draws the graph of artifacts that a result depends on, from their manifests, as inline SVG.

An artifact stands below all its inputs. An edge is left out where a longer path implies it, so that
the path through the rounds is easy to see.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tasks.pages import render
from tasks.pages.text import label
from tasks.runtime.protocol import ZERO_SHOT

WIDTH, BOX, HIGH, STEP = 350.0, 182.0, 38.0, 62.0


def graph_svg(stages: Sequence[Mapping[str, Any]]) -> Markup:
    """The graph as an SVG element; "" when no manifest names its inputs."""
    known = {str(s["fingerprint"]): s for s in stages if s.get("fingerprint")}
    inputs = {
        mark: {str(i) for i in (stage.get("inputs") or {}).values()} & known.keys()
        for mark, stage in known.items()
    }
    if not any(inputs.values()):
        return Markup()
    depth = _depths(inputs)
    layers: dict[int, list[str]] = defaultdict(list)
    for mark in known:
        layers[depth[mark]].append(mark)
    wide = max(len(layer) for layer in layers.values())
    width = max(WIDTH, wide * (BOX + 14))
    position = {
        mark: ((index + 0.5) * width / len(layer), 6 + level * STEP)
        for level, layer in layers.items()
        for index, mark in enumerate(layer)
    }
    height = 12 + (max(layers) + 1) * STEP - (STEP - HIGH)
    return render(
        "graph.svg.jinja",
        width=f"{width:g}",
        height=f"{height:g}",
        rem=f"{width / 16:.1f}",
        description=f"{len(known)} artifacts in {len(layers)} layers, each below what it was made from",
        edges=[
            _edge(*position[needed], *position[mark])
            for mark, needs in _shortest(inputs).items()
            for needed in sorted(needs)
        ],
        boxes=[_box(*position[mark], stage) for mark, stage in known.items()],
    )


def stage_name(stage: Mapping[str, Any]) -> str:
    """A stage's name with its method and round: "Train, DiVE-k, round 1"."""
    settings = stage.get("settings") or {}
    about = []
    method = settings.get("method") or stage.get("method")
    if method:
        about.append(label(str(method)))
    round_ = settings.get("refresh_round", stage.get("refresh_round"))
    if round_ is not None and method != ZERO_SHOT:
        about.append(f"round {round_}")
    return ", ".join([str(stage.get("stage", "?")), *about])


def _depths(inputs: Mapping[str, set[str]]) -> dict[str, int]:
    """The length of the longest path to each artifact. Terminates even if a manifest named a cycle."""
    depth = dict.fromkeys(inputs, 0)
    for _ in inputs:
        for mark, needs in inputs.items():
            depth[mark] = min(len(inputs), max((depth[n] + 1 for n in needs), default=0))
    return depth


def _shortest(inputs: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Each artifact's inputs, without those that are also inputs of another input."""
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
    return f"M{x1:.1f} {start:.1f}{curve}"


def _box(x: float, y: float, stage: Mapping[str, Any]) -> dict[str, str]:
    return {
        "left": f"{x - BOX / 2:.1f}",
        "top": f"{y:.1f}",
        "width": f"{BOX:g}",
        "height": f"{HIGH:g}",
        "x": f"{x:.1f}",
        "first_line": f"{y + 16:.1f}",
        "second_line": f"{y + 31:.1f}",
        "name": stage_name(stage)[:30],
        "fingerprint": str(stage.get("fingerprint", ""))[:10],
    }
