"""The report's tables as HTML: results, how answers were read, rounds, and how it was made."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.report_graph import stage_name
from tasks.report_text import esc, label, percent, points, signs, title_of

Row = tuple[str, Callable[[dict[str, Any]], str]]


def results_table(metrics: Mapping[str, Any]) -> str:
    """Accuracy of every policy by mode and group, and its paired difference from the first."""
    first, *others = [esc(label(e["name"])) for e in metrics["evaluations"]]
    heads = [first, *others]
    if len(others) == 1:
        heads.append("difference,<br>image by image")
    else:
        heads += [f"{name} −<br>{first}" for name in others]
    keys = (*metrics["images"]["groups"], "harmonic_mean")
    bodies = []
    for mode in metrics["modes"]:
        found = [e["modes"].get(mode, {}) for e in metrics["evaluations"]]
        rows = [f'<tr><th colspan="{len(heads) + 1}">{esc(title_of(mode))}</th></tr>']
        for key in (key for key in keys if key in found[0]):
            cells = [_rate_cell(figures.get(key)) for figures in found]
            cells += [_change_cell(f.get("difference", {}).get(key)) for f in found[1:]]
            rows.append(f"<tr><th>{esc(label(key))}</th>{''.join(cells)}</tr>")
        bodies.append(f'<tbody class="mode">{"".join(rows)}</tbody>')
    head = "".join(f"<th>{text}</th>" for text in heads)
    many = " many" if len(others) > 1 else ""
    return (
        f'<div class="wide"><table class="results{many}"><thead><tr><th></th>{head}</tr></thead>'
        f"{''.join(bodies)}</table></div>"
        '<p class="quiet">Small figures: 95 % intervals, Wilson’s for accuracies, a bootstrap over '
        "images for differences and harmonic means. They hold for the draw of test images; another "
        "training seed may move the result further.</p>"
    )


def judged_table(metrics: Mapping[str, Any]) -> str:
    """Accuracy with a judge's second opinion, beside that by the card's names alone."""
    rows = []
    for evaluation in metrics["evaluations"]:
        for mode, by_group in (evaluation.get("judged") or {}).items():
            for group, figures in by_group.items():
                plain = evaluation["modes"].get(mode, {}).get(group)
                rows.append(
                    f"<tr><th>{esc(label(evaluation['name']))}<br>"
                    f"<small>{esc(label(mode))}, {esc(group)}</small></th>{_rate_cell(plain)}"
                    f'{_rate_cell(figures)}<td class="n">{figures["undecided"]:,}</td></tr>'
                )
    if not rows:
        return ""
    return (
        '<h3>A second opinion</h3><p class="quiet">A language model judged the answers that name no '
        "class of the card. Where it gave no verdict the answer keeps the first one, and is counted "
        'in the last column.</p><div class="wide"><table class="results flat"><thead><tr><th></th>'
        '<th>by the card’s names</th><th>with the judge</th><th class="n">no verdict</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def status_list(metrics: Mapping[str, Any]) -> str:
    """How the answers were read, by policy and mode: a fold-out list."""
    rows = []
    for evaluation in metrics["evaluations"]:
        for mode, figures in evaluation["modes"].items():
            counts: Counter[str] = Counter()
            for group in metrics["images"]["groups"]:
                counts.update(figures.get(group, {}).get("status", {}))
            told = " · ".join(f"{esc(label(s))} {n:,}" for s, n in counts.most_common(12))
            name = f"{label(evaluation['name'])}, {label(mode)}"
            rows.append(f"<dt>{esc(name)}</dt><dd>{told}</dd>")
    return (
        f"<details><summary>How the answers were read</summary><dl>{''.join(rows)}</dl></details>"
    )


def refresh_table(rounds: Sequence[dict[str, Any]]) -> str:
    """What each round proposed and kept: one column a round, lines without a figure left out."""
    if not rounds:
        return ""
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
    head = "".join(f'<th class="n">round {esc(r["round"])}</th>' for r in rounds)
    lines = []
    for name, figure in rows:
        cells = [figure(entry) for entry in rounds]
        if any(cells):
            shown = "".join(f'<td class="n">{esc(cell) or "–"}</td>' for cell in cells)
            lines.append(f"<tr><th>{esc(name)}</th>{shown}</tr>")
    return (
        '<h3>What each round saw</h3><p class="quiet">A refresh asks the newly trained policy '
        "again, so its questions follow what that policy now confuses.</p>"
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def stages_table(stages: Sequence[dict[str, Any]]) -> str:
    """Every artifact in order: fingerprint, time as a bar, memory; recipe and versions fold out."""
    if not stages:
        return ""
    longest = max((stage.get("seconds") or 0 for stage in stages), default=0) or 1
    lines, recipes = [], []
    for stage in stages:
        name, seconds = esc(stage_name(stage)), stage.get("seconds")
        width = 100 * (seconds or 0) / longest
        memory = stage.get("peak_memory_mb")
        told = _counts(_rows(stage.get("rows")), " ")
        mark = f"<code>{esc(str(stage.get('fingerprint', ''))[:10])}</code>"
        lines.append(
            f"<tr><th>{name}<br><small>{esc(told)}</small></th><td>{mark}</td>"
            f'<td><span class="bar"><i style="width:{width:.1f}%"></i></span></td>'
            f'<td class="n">{duration(seconds)}</td>'
            f'<td class="n">{_memory(memory)}</td></tr>'
        )
        recipes.append(f"<details><summary>{name} {mark}</summary>{_recipe(stage)}</details>")
    total = sum(stage.get("seconds") or 0 for stage in stages)
    return (
        f"<p>{len(stages)} artifacts, {duration(total)} in all{_hosts(stages)}. A fingerprint "
        "names an artifact by its settings and by what it was made from: equal fingerprints, equal "
        'recipes.</p><div class="wide"><table class="stages"><thead><tr><th>stage</th>'
        '<th>fingerprint</th><th>where the time went</th><th class="n">time</th>'
        f'<th class="n">peak memory</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f"<h3>Settings and commands</h3>{''.join(recipes)}{_versions(stages)}"
    )


def duration(seconds: float | None) -> str:
    """8.2 s, 2 min 05 s, 3 h 20 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _rate_cell(figures: dict[str, Any] | None) -> str:
    if not figures:
        return "<td>–</td>"
    low, high = figures["interval"]
    value = percent(figures["accuracy"])
    return f"<td><span>{value}</span><small>{percent(low)}–{percent(high)}</small></td>"


def _change_cell(change: dict[str, Any] | None) -> str:
    if not change:
        return "<td>–</td>"
    low, high = change["interval"]
    style = "sure up" if low > 0 else "sure down" if high < 0 else ""
    shown = f'<span class="{style}">{points(change["mean"])}</span>'
    shown += f"<small>{points(low)} to {points(high)}</small>"
    if "won" in change:
        shown += f"<small>{change['won']:,} won, {change['lost']:,} lost</small>"
    return f"<td>{signs(shown)}</td>"


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
    """Rows by table: the shards of one table, `mcq-00000.parquet` and on, are added up."""
    totals: Counter[str] = Counter()
    for name, count in (rows if isinstance(rows, dict) else {}).items():
        if isinstance(count, int):
            totals[re.sub(r"(-\d+)?(\.parquet)?$", "", str(name))] += count
    return dict(totals)


def _recipe(stage: dict[str, Any]) -> str:
    command = stage.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    facts = {"code version": stage.get("code_version"), **(stage.get("settings") or {})}
    facts |= {f"from {name}": str(mark)[:10] for name, mark in (stage.get("inputs") or {}).items()}
    listed = "".join(
        f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in facts.items() if v is not None
    )
    return f"<dl>{listed}</dl>" + (f"<pre>{esc(command)}</pre>" if command else "")


def _versions(stages: Sequence[dict[str, Any]]) -> str:
    found: dict[str, set[str]] = {}
    for stage in stages:
        for name, version in (stage.get("versions") or {}).items():
            found.setdefault(str(name), set()).add(str(version))
    if not found:
        return ""
    told = " · ".join(f"{name} {' and '.join(sorted(found[name]))}" for name in sorted(found))
    return f'<h3>Versions</h3><p class="quiet">{esc(told)}</p>'


def _hosts(stages: Sequence[dict[str, Any]]) -> str:
    hosts: dict[str, None] = {}  # in order of first use
    for stage in stages:
        host = stage.get("host")
        if isinstance(host, dict) and host:
            told = [str(host.get("cpu", "unknown processor"))]
            told += [f"{host['cores']} cores"] if host.get("cores") else []
            told += [f"{host['memory_gib']:.0f} GiB"] if host.get("memory_gib") else []
            gpus = Counter(map(str, host.get("gpus") or ()))
            told += [f"{count} x {name}" for name, count in gpus.items()]
            hosts[", ".join(told)] = None
    return f" on {esc('; '.join(hosts))}" if hosts else ""


def _memory(megabytes: float | None) -> str:
    if megabytes is None:
        return "–"
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"
