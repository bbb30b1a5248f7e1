"""Template values for the report's tables: results, answer statuses, rounds, stages."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.pages.compare_sections import thought_rows
from tasks.pages.report.lineage import stage_name
from tasks.pages.text import in_order, label, marked, percent

Row = tuple[str, Callable[[dict[str, Any]], str]]


def results_table(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy of every policy by mode and group, and its paired difference from the first policy."""
    evaluations = metrics["evaluations"]
    keys = (*metrics["images"]["groups"], "harmonic_mean")
    modes = []
    for mode in metrics["modes"]:
        by_policy = [e["modes"].get(mode, {}) for e in evaluations]
        rows = [
            {
                "key": key,
                "rates": [figures.get(key) for figures in by_policy],
                "changes": [figures.get("difference", {}).get(key) for figures in by_policy[1:]],
            }
            for key in keys
            if key in by_policy[0]
        ]
        modes.append({"name": mode, "rows": rows})
    names = [evaluations[0]["name"]]
    names += [marked(e["name"], metrics.get("seen", {})) for e in evaluations[1:]]
    return {"names": names, "modes": modes}


def judged_table(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy with the judge's verdicts, beside that by the card's names, and how far they agree."""
    return [
        {
            "name": evaluation["name"],
            "mode": mode,
            "group": group,
            "plain": evaluation["modes"].get(mode, {}).get(group),
            "figures": figures,
        }
        for evaluation in metrics["evaluations"]
        for mode, by_group in (evaluation.get("judged") or {}).items()
        for group, figures in by_group.items()
    ]


def budget_table(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy by strategy, one pair of columns for each policy; empty where nothing was sampled."""
    curves = [{p["strategy"]: p for p in e["budget_curve"]} for e in evaluations]
    strategies = list(dict.fromkeys(name for curve in curves for name in curve))
    rows = [
        {"strategy": name, "points": [curve.get(name) for curve in curves]} for name in strategies
    ]
    return {"names": [e["name"] for e in evaluations], "rows": rows} if rows else {}


def near_table(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Near misses by mode, one row for each; empty where the card has no taxonomy."""
    modes = in_order(mode for e in evaluations for mode in e["near_misses"])
    rows = [
        {"mode": mode, "counts": [e["near_misses"].get(mode) for e in evaluations]}
        for mode in modes
    ]
    return {"names": [e["name"] for e in evaluations], "rows": rows} if rows else {}


def thought_table(evaluations: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The length of thoughts beside accuracies, as `thought_rows` has them."""
    of = {evaluation["name"]: evaluation for evaluation in evaluations}

    def accuracy(name: str, mode: str, key: str) -> float | None:
        return of[name]["modes"].get(mode, {}).get(key, {}).get("accuracy")

    return thought_rows({name: e.get("thoughts") or {} for name, e in of.items()}, accuracy)


def judged_pass_table(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pass@k by the card's names and by the judge, one row for each policy, group and k."""
    return [
        {"name": evaluation["name"], "group": group, "k": k, **figures}
        for evaluation in metrics["evaluations"]
        for group, by_k in (evaluation.get("judged_pass") or {}).items()
        for k, figures in by_k.items()
    ]


def status_list(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the answers were read, by policy and mode."""
    rows = []
    for evaluation in metrics["evaluations"]:
        for mode, figures in evaluation["modes"].items():
            counts: Counter[str] = Counter()
            for group in metrics["images"]["groups"]:
                counts.update(figures.get(group, {}).get("status", {}))
            listed = " · ".join(f"{label(s)} {n:,}" for s, n in counts.most_common(12))
            rows.append((f"{label(evaluation['name'])}, {label(mode)}", listed))
    return rows


def refresh_table(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What each round proposed and kept, one column for each round; empty lines are left out."""
    if not rounds:
        return {}
    outcomes = Counter(o for entry in rounds for o in entry["build_mcq"].get("outcomes", {}))
    rows: list[Row] = [
        ("train images asked", lambda r: _count(r["build_mcq"].get("images"))),
        ("Pass@1 on them", lambda r: _share(r["propose"].get("pass_at_1"), 1)),
        ("Pass@N on them", lambda r: _share(r["propose"].get("pass_at_n"), 1)),
        ("rollouts that name the truth", lambda r: _share(r["refresh"].get("truth_share"), 1)),
        ("votes’ entropy, nats", lambda r: _decimal(r["refresh"].get("entropy"))),
        ("truth among the top k", lambda r: _of(r["build_mcq"], "truth_in_top_k", "images")),
        *((_outcome_name(o), _outcome(o)) for o in sorted(outcomes, key=_kept_first)),
        ("questions with the truth put in", lambda r: _injected(r["build_mcq"])),
        (
            "questions by number of options",
            lambda r: _counts(r["build_mcq"].get("option_counts"), ": "),
        ),
        ("questions by right letter", lambda r: _counts(r["build_mcq"].get("letters"), ": ")),
        ("rollouts saved by instalments", lambda r: _count(r["propose"].get("saved"))),
        ("answers that could not be read", lambda r: _of(r["propose"], "unparsed", "rollouts")),
        ("answers cut off at the limit", lambda r: _cut_off(r["propose"])),
        ("asked about before", lambda r: _of(r["refresh"], "kept_questions", "questions")),
        (
            "of these, other options",
            lambda r: _of(r["refresh"], "changed_options", "kept_questions"),
        ),
        ("solved: last answers all right", lambda r: _of(r["refresh"], "solved", "asked")),
        ("training steps", lambda r: _count(r["train"]["steps"] or None)),
        ("reward, first to last tenth", lambda r: _course(r["train"], "reward")),
        ("KL at the end", lambda r: _decimal(r["train"]["last"].get("kl"))),
    ]
    lines = [(name, [figure(entry) for entry in rounds]) for name, figure in rows]
    return {
        "rounds": [entry["round"] for entry in rounds],
        "rows": [(name, cells) for name, cells in lines if any(cells)],
    }


def pseudo_label_rows(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How often the majority vote that was trained on was wrong, one row for each round and group."""
    return [
        {
            "round": entry["round"],
            "group": group,
            "questions": f"{counts['questions']:,}",
            "wrong": _of(counts, "wrong", "questions"),
            "none": _of(counts, "none", "questions"),
        }
        for entry in rounds
        for group, counts in (entry.get("pseudo_labels") or {}).items()
    ]


def stages_table(stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every artifact in order: fingerprint, time, memory and recipe; then hosts and versions."""
    if not stages:
        return {}
    longest = max((stage.get("seconds") or 0 for stage in stages), default=0) or 1
    return {
        "rows": [
            {
                "name": stage_name(stage),
                "counts": _counts(_rows(stage.get("rows")), " "),
                "fingerprint": str(stage.get("fingerprint", ""))[:10],
                "width": f"{100 * (stage.get('seconds') or 0) / longest:.1f}",
                "time": duration(stage.get("seconds")),
                "memory": _memory(stage.get("peak_memory_mb")),
                "recipe": _recipe(stage),
                "command": _command(stage),
            }
            for stage in stages
        ],
        "total": duration(sum(stage.get("seconds") or 0 for stage in stages)),
        "hosts": _hosts(stages),
        "versions": _versions(stages),
    }


def duration(seconds: float | None) -> str:
    """A duration as text: 8.2 s, 2 min 05 s, or 3 h 20 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _outcome(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda entry: _count(entry["build_mcq"].get("outcomes", {}).get(name, 0))


def _outcome_name(outcome: str) -> str:
    return "questions kept" if outcome == "kept" else f"skipped: {label(outcome)}"


def _kept_first(outcome: str) -> tuple[bool, str]:
    return outcome != "kept", outcome


def _injected(stats: dict[str, Any]) -> str:
    return _of(stats | {"kept": stats.get("outcomes", {}).get("kept")}, "injected", "kept")


def _cut_off(stats: dict[str, Any]) -> str:
    reasons = stats.get("finish_reasons") or {}
    return _of(stats | {"cut": reasons.get("length", 0)}, "cut", "rollouts") if reasons else ""


def _course(train: dict[str, Any], column: str) -> str:
    first, last = train["first"].get(column), train["last"].get(column)
    return "" if first is None or last is None else f"{_decimal(first)} → {_decimal(last)}"


def _of(stats: dict[str, Any], part: str, whole: str) -> str:
    if stats.get(part) is None or not stats.get(whole):
        return ""
    return f"{stats[part]:,} ({_share(stats[part], stats[whole])})"


def _share(part: float | None, whole: float) -> str:
    return "" if part is None else f"{percent(part / whole)} %"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _counts(counts: dict[str, Any] | None, between: str) -> str:
    return ", ".join(
        f"{key}{between}{n:,}" if isinstance(n, int) else f"{key}{between}{n}"
        for key, n in sorted((counts or {}).items())
    )


def _rows(rows: Any) -> dict[str, int]:
    """Table -> row count; shards of one table, such as `mcq-00000.parquet`, are added up."""
    totals: Counter[str] = Counter()
    for name, count in (rows if isinstance(rows, dict) else {}).items():
        if isinstance(count, int):
            totals[re.sub(r"(-\d+)?(\.parquet)?$", "", str(name))] += count
    return dict(totals)


def _recipe(stage: dict[str, Any]) -> dict[str, Any]:
    facts = {"code version": stage.get("code_version"), **(stage.get("settings") or {})}
    facts |= {f"from {name}": str(mark)[:10] for name, mark in (stage.get("inputs") or {}).items()}
    return {name: value for name, value in facts.items() if value is not None}


def _command(stage: dict[str, Any]) -> str:
    command = stage.get("command") or ""
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command)


def _versions(stages: Sequence[dict[str, Any]]) -> str:
    by_package: dict[str, set[str]] = {}
    for stage in stages:
        for name, version in (stage.get("versions") or {}).items():
            by_package.setdefault(str(name), set()).add(str(version))
    return " · ".join(
        f"{name} {' and '.join(sorted(by_package[name]))}" for name in sorted(by_package)
    )


def _hosts(stages: Sequence[dict[str, Any]]) -> str:
    hosts: dict[str, None] = {}  # in order of first use
    for stage in stages:
        host = stage.get("host")
        if isinstance(host, dict) and host:
            parts = [str(host.get("cpu", "unknown processor"))]
            parts += [f"{host['cores']} cores"] if host.get("cores") else []
            parts += [f"{host['memory_gib']:.0f} GiB"] if host.get("memory_gib") else []
            gpus = Counter(map(str, host.get("gpus") or ()))
            parts += [f"{count} x {name}" for name, count in gpus.items()]
            hosts[", ".join(parts)] = None
    return "; ".join(hosts)


def _memory(megabytes: float | None) -> str:
    if megabytes is None:
        return "–"
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"
