"""What changed, as HTML: what refreshes bought, confusions, single classes, other test sets."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tasks.report_text import esc, label, percent, points, signs


def confusion_tables(confusions: Mapping[str, Any]) -> str:
    """Pairs of classes that are mixed up less, and more, after training."""
    if not confusions or not (confusions["resolved"] or confusions["introduced"]):
        return ""
    most = max(
        max(pair["before"], pair["after"])
        for pair in (*confusions["resolved"], *confusions["introduced"])
    )
    told = (
        f"Wrong answers in the mode “{label(confusions['mode'])}”, by pair of classes: over all "
        f"pairs {confusions['gone']:,} fewer and {confusions['new']:,} more. Each pair rests on few "
        "images; read it as a place to look, not as a result."
    )
    tables = "".join(
        f"<div><h4>{title}</h4>{_pairs(confusions[key], most)}</div>"
        for key, title in (("resolved", "Resolved"), ("introduced", "Introduced"))
    )
    return f'<h3>Confusions</h3><p class="quiet">{esc(told)}</p><div class="two">{tables}</div>'


def _pairs(pairs: Sequence[Mapping[str, Any]], most: int) -> str:
    if not pairs:
        return '<p class="quiet">none</p>'
    rows = "".join(
        f"<tr><th>{esc(pair['truth'])}<br><small>taken for {esc(pair['answer'])}</small></th>"
        f'<td class="n">{pair["before"]} → {pair["after"]}</td>'
        f'<td><span class="bar pair"><i class="was" style="width:{100 * pair["before"] / most:.0f}%"></i>'
        f'<i style="width:{100 * pair["after"] / most:.0f}%"></i></span></td></tr>'
        for pair in pairs
    )
    return (
        '<table class="pairs"><thead><tr><th>truth</th><th class="n">images</th>'
        f"<th>before, after</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def class_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], mode: str) -> str:
    """Accuracy of single classes, those that changed most first; folds out."""
    if not rows or len(names) < 2:
        return ""

    def change(row: Mapping[str, Any]) -> float:
        return (row["right"][-1] - row["right"][0]) / row["images"]

    heads = "".join(f'<th class="n">{esc(label(name))}</th>' for name in names)
    lines = "".join(
        f"<tr><th>{esc(row['class'])}<br><small>{esc(row['group'])}, {row['images']} images</small></th>"
        + "".join(f'<td class="n">{percent(n / row["images"])}</td>' for n in row["right"])
        + f'<td class="n">{signs(points(change(row)))}</td></tr>'
        for row in sorted(rows, key=lambda row: (-change(row), row["class"]))
    )
    return (
        f"<details><summary>Accuracy of each class, {esc(label(mode))}</summary>"
        f'<div class="wide"><table><thead><tr><th>class</th>{heads}<th class="n">change</th></tr>'
        f"</thead><tbody>{lines}</tbody></table></div></details>"
    )


def refresh_changes(rounds: Sequence[Mapping[str, Any]]) -> str:
    """What each refresh changed, in sentences; nothing where there is one round."""
    told = []
    for before, after in pairwise(rounds):
        then, now = before["refresh"], after["refresh"]
        said = []
        if None not in (then.get("truth_share"), now.get("truth_share")):
            said.append(
                f"of all rollouts {percent(now['truth_share'])} % name the truth, "
                f"{_before(percent(then['truth_share']), percent(now['truth_share']))}"
            )
        if None not in (then.get("entropy"), now.get("entropy")):
            was, is_ = f"{then['entropy']:.2f}", f"{now['entropy']:.2f}"
            said.append(f"the votes’ entropy is {is_} nats, {_before(was, is_)}")
        if now.get("kept_questions") is not None:
            kept, changed = now["kept_questions"], now["changed_options"]
            gone = then["questions"] - kept
            said.append(
                f"{gone:,} of {then['questions']:,} images need no question any more, "
                f"{now['new_questions']:,} have one for the first time, and of the {kept:,} that "
                f"have one again {changed:,} get other options"
            )
        if then.get("asked"):
            said.append(
                f"in round {before['round']} {then['solved']:,} of {then['asked']:,} questions asked "
                "were answered right by all of their last answers"
            )
        if said:
            told.append(f"<p>At round {esc(after['round'])}, {esc('; '.join(said))}.</p>")
    return f"<h3>What each refresh changed</h3>{''.join(told)}" if told else ""


def _before(then: str, now: str) -> str:
    return "as before" if then == now else f"{then} before"


def cross_table(cross: Sequence[Mapping[str, Any]]) -> str:
    """Train set by test set: harmonic mean (or the only group's accuracy), one step."""
    if not cross:
        return ""
    sets = sorted({entry["set"] for entry in cross})
    rows = dict.fromkeys((entry["trained_on"], entry["name"]) for entry in cross)
    by_place = {(e["trained_on"], e["name"], e["set"]): e for e in cross}
    head = "".join(f'<th class="n">{esc(name)}</th>' for name in sets)
    lines = []
    for trained, method in rows:
        cells = []
        for name in sets:
            entry = by_place.get((trained, method, name))
            figures = entry and entry["figure"]
            low, high = figures["interval"] if figures else (None, None)
            cells.append(
                f'<td class="n"><b>{percent(figures["accuracy"])}</b><br>'
                f"<small>{percent(low)}–{percent(high)}</small></td>"
                if figures
                else '<td class="n">–</td>'
            )
        lines.append(
            f"<tr><th>{esc(label(method))}<br><small>trained on {esc(trained)}</small></th>"
            f"{''.join(cells)}</tr>"
        )
    return (
        '<h3>On other sets</h3><p class="quiet">Policies by what they were trained on, in rows, on '
        f"the test images of each set, in columns: {esc(label(cross[0]['key']))}, "
        f"{esc(label(cross[0]['mode']))}, with 95 % intervals.</p>"
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
