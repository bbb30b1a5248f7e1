"""What BuildMCQ made, to look at: counts, and a page of questions that opens offline.

The page holds a gallery of questions with image, options, votes and answers as they came, to be
filtered by class, by where the truth came from, and by difficulty. Filters can be linked to:
`page.html#class=crow&injected=yes&level=hard`. Whatever a model wrote is escaped; the one script
is allowed by its digest and no other can run.
"""

import base64
import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from tasks import shards
from tasks.gallery import data_uri
from tasks.prompts import LETTERS
from tasks.report_style import page
from tasks.report_text import esc

# By the truth's margin over the strongest other candidate, as a share of the rollouts.
LEVELS = {"easy": "truth ahead by a quarter or more", "close": "between", "hard": "behind by more"}
_EDGE = 0.25
_ANSWERS = 12  # of an image, shown at most
_CUT = 120  # characters of an answer

_SCRIPT = """
const form = document.querySelector("form"), shown = document.querySelector("output");
const cards = [...document.querySelectorAll("article")];
function apply() {
  const wanted = [...new FormData(form)].filter(([, value]) => value);
  let count = 0;
  for (const card of cards) {
    card.hidden = !wanted.every(([key, value]) => card.dataset[key] === value);
    count += !card.hidden;
  }
  shown.textContent = count;
}
for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
  const field = form.elements.namedItem(key);
  if (field) field.value = value;
}
form.addEventListener("input", apply);
apply();
"""
_STYLE = """
form{display:flex;flex-wrap:wrap;gap:.6rem 1.4rem;align-items:end;margin:1rem 0;
 position:sticky;top:0;background:var(--ground);padding:.6rem 0;z-index:1}
label{display:grid;font-size:.875rem;color:var(--muted)}
select{font:inherit;color:var(--ink);background:var(--raised);border:1px solid var(--rule);
 border-radius:3px;padding:.25rem .4rem;max-width:16rem}
article[hidden]{display:none}
.shown .side{grid-column:span 1}
"""


def facts(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The counts in `stats.json` as (what, how much), for the terminal and the page."""
    outcomes = dict(stats["outcomes"])
    kept = outcomes.pop("kept", 0)
    skipped = ", ".join(f"{count:,} {name}" for name, count in sorted(outcomes.items()))
    sizes = _listed(dict(sorted(stats["option_counts"].items(), key=lambda item: int(item[0]))))
    told = [
        ("questions", f"{kept:,} of {stats['images']:,} images"),
        ("skipped", skipped or "none"),
        ("truth injected", _share(stats["injected"], kept)),
        ("options", f"{stats['mean_options']:.2f} on average ({sizes})"),
        ("options by source", _listed(stats["option_sources"])),
        ("right letters", _listed(dict(sorted(stats["letters"].items())))),
        ("unparsed rollouts", _share(stats["unparsed"], stats["rollouts"])),
        ("rollouts that name no candidate", _share(stats["outside_vocabulary"], stats["rollouts"])),
        ("rollouts by how they were read", _listed(_falling(stats["match_steps"]))),
    ]
    if stats["answer_differs_from_label"]:
        wrong = _share(stats["answer_differs_from_label"], kept)
        told.append(("answers that differ from the label", wrong))
    for truth, other, votes in stats["most_confused"][:10]:
        told.append(("most confused", f"{truth} taken for {other}: {votes:,} votes"))
    return told


def questions_page(folder: Path, stats: Mapping[str, Any], title: str, size: int) -> str:
    """The page as HTML; at most `size` questions of the artifact in `folder`, drawn by a hash of
    their ids."""
    rows, total = _drawn(folder, size)
    told = _candidates(folder, {row["image_id"] for row in rows})
    cards = "".join(_card(row, told[row["image_id"]]) for row in rows)
    counts = "".join(f"<tr><th>{esc(k)}</th><td>{esc(v)}</td></tr>" for k, v in facts(stats))
    truths = sorted({_truth(row) for row in rows})
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    form = "".join(
        (
            _select("class", "right answer", truths),
            _select("injected", "truth injected", ("yes", "no")),
            _select("level", "difficulty", tuple(LEVELS)),
        )
    )
    drawn = "all of them" if len(rows) == total else "drawn by a hash of their ids"
    levels = "; ".join(f"{name}: {meaning}" for name, meaning in LEVELS.items())
    body = (
        f"<header><h1>{esc(title)}</h1></header><main>"
        f'<section><h2>Counts</h2><div class="wide"><table><tbody>{counts}</tbody></table></div>'
        f"</section><section><h2>Questions</h2><p>{len(rows):,} of {total:,} questions, {drawn}. "
        f"Difficulty by what the policy proposed; {esc(levels)}.</p>"
        f'<form autocomplete="off">{form}<p><output>{len(rows)}</output> shown</p></form>'
        f"{cards}</section></main><script>{_SCRIPT}</script>"
    )
    return page(title, body, style=_STYLE, allowed=f"; script-src 'sha256-{digest}'")


def level(margin: float) -> str:
    """The difficulty under which a question is filed, by its margin."""
    return "easy" if margin >= _EDGE else "hard" if margin < -_EDGE else "close"


def _drawn(folder: Path, size: int) -> tuple[list[dict[str, Any]], int]:
    """`size` questions with the lowest ids, which are hashes, and how many there are."""
    paths = shards.paths(folder, "mcq")
    ids = [
        mcq_id
        for path in paths
        for mcq_id in shards.read_file(path, ["mcq_id"])["mcq_id"].to_pylist()
    ]
    chosen = heapq.nsmallest(size, ids)
    rows = [
        row
        for path in paths
        for row in shards.read_file(path, None, pc.field("mcq_id").isin(chosen)).to_pylist()
    ]
    return sorted(rows, key=lambda row: row["mcq_id"]), len(ids)


def _candidates(folder: Path, image_ids: set[str]) -> dict[str, dict[str, Any]]:
    wanted = pc.field("image_id").isin(sorted(image_ids))
    return {
        row["image_id"]: row
        for path in shards.paths(folder, "candidates")
        for row in shards.read_file(path, None, wanted).to_pylist()
    }


def _card(row: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    truth = _truth(row)
    source = data_uri(row["image"]["bytes"])
    image = f'<img src="{source}" alt="{esc(truth)}">' if source else "<p>no image</p>"
    injected = "yes" if row["truth_injected"] else "no"
    figures = (
        f"truth share {row['truth_share']:.2f}, margin {row['margin']:+.2f}, "
        f"entropy {row['entropy']:.2f}"
    )
    differs = "<br>the label says otherwise" if row["label_differs"] else ""
    return (
        f'<article class="shown" data-class="{esc(truth)}" data-injected="{injected}" '
        f'data-level="{level(row["margin"])}"><div class="who">{image}<div>'
        f'<p class="truth">{esc(truth)}</p><p class="quiet">{esc(row["image_id"])}<br>'
        f"{figures}{differs}</p></div></div>"
        f'<div class="side"><h4>Options</h4><ul class="options">{"".join(_options(row))}</ul></div>'
        f'<div class="side"><h4>What {told["num_rollouts"]} rollouts said</h4>'
        f'<ul class="options">{"".join(_answers(told))}</ul></div></article>'
    )


def _options(row: Mapping[str, Any]) -> Iterator[str]:
    columns = (row["options"], row["option_votes"], row["option_sources"])
    for letter, option, votes, source in zip(LETTERS, *columns, strict=False):
        right = letter == row["answer_letter"]
        mark, picked = ("truth, ", ' class="picked"') if right else ("", "")
        yield (
            f"<li{picked}><span>{letter}</span><span>{esc(option)} "
            f'<span class="tag">({mark}{esc(source)})</span></span>'
            f'<span class="vote">{votes}</span></li>'
        )


def _answers(told: Mapping[str, Any]) -> Iterator[str]:
    columns = (told["answers"], told["answer_votes"], told["answer_steps"])
    rows = list(zip(*columns, strict=True))
    for text, votes, step in rows[:_ANSWERS]:
        said = text if len(text) <= _CUT else f"{text[:_CUT]} …"
        yield (
            f'<li><span></span><span>{esc(said)} <span class="tag">({esc(step)})</span></span>'
            f'<span class="vote">{votes}</span></li>'
        )
    if len(rows) > _ANSWERS:
        rest = len(rows) - _ANSWERS
        yield f'<li><span></span><span class="quiet">{rest} more</span></li>'


def _select(name: str, title: str, values: Sequence[str]) -> str:
    options = "".join(f'<option value="{esc(v)}">{esc(v)}</option>' for v in values)
    return f'<label>{title}<select name="{name}"><option value="">any</option>{options}</select></label>'


def _truth(row: Mapping[str, Any]) -> str:
    return row["options"][LETTERS.index(row["answer_letter"])]


def _falling(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / max(1, whole):.1f} %)"
