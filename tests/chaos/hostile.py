"""An engine that answers with everything one should not print, match, parse or name a file by."""

import html.parser
import json
import random
import re
from pathlib import Path

from tasks.engines.base import Completion, Request, Sampling
from tasks.engines.settings import EngineSettings
from tests.chaos import world
from tests.chaos.figures import Figure

MARK = "x9evil"  # in everything that must never act
PARTS = (
    f"<script>{MARK}()</script>", f"<img src=x onerror={MARK}()>", f"</pre><svg onload={MARK}()>",
    f"javascript:{MARK}()", f'" onmouseover="{MARK}()', f"<!--{MARK}", "]]>", "&lt;script&gt;", "&#x3c;",
    f"</style><style>@import '//{MARK}'</style>", "</title>", "</html>", "<base href=//x>",
    "\x00", "\x01\x02\x1b[31m\x1b[2J", "\x7f\x9b", "\r", "\n\n", "\t", "\x0b\x0c", "\u2028\u2029",
    "\ud800", "\udfff\ud83d", "\u202e", "\ufeff", "\ufffe\uffff", "\u200d" * 40, "e" + "\u0301" * 200,
    "../../../../etc/passwd", "C:\\Windows\\..", "/dev/null", "con", "a/b/../c", "%2e%2e%2f", "~root",
    "<think>", "</think>", "<answer>", "</answer>", "<answer></answer>", "<answer>" * 50,
    "<think>" * 50, "</answer>" * 50, "<|im_end|>", "<|image_pad|>", "{{7*7}}", "${x}", "%s%n", "'; --",
    "NaN", "-1", "1e400", "null", "[]", "A", "B.", "(C)", "𝒜", "Ａ", "٣", "", " ",
)  # fmt: skip


class Hostile:
    """Answers drawn from the parts above by (image, sample, seed); some of a megabyte."""

    def __init__(self, policy: Path, settings: EngineSettings):
        pass

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        return [
            [Completion(_text(f"{r.key}{i}{sampling.seed}", r), "stop", 3, -1.0) for i in range(sampling.n)]
            for r in requests
        ]  # fmt: skip


def _text(key: str, request: Request) -> str:
    draw = random.Random(key)
    truth = request.key.split("/")[2]
    parts = [
        *draw.choices(PARTS, k=draw.randrange(1, 9)),
        *([truth] if draw.random() < 0.2 else []),
    ]
    draw.shuffle(parts)
    inside = draw.choice(["", " ", "\n"]).join(parts)
    if draw.random() < 0.001:
        inside += draw.choice(["<answer>", "z", "\u0301", "</think><think>"]) * (1 << 17)
    frame = draw.random()
    if frame < 0.6:
        return f"<think>{draw.choice(PARTS)}</think><answer>{inside}</answer>"
    return f"<answer>{truth}</answer>{inside}" if frame < 0.7 else inside


def engine(policy: Path, settings: EngineSettings) -> Hostile:
    """`[engine] backend = tests.chaos.hostile:engine`."""
    return Hostile(policy, settings)


def hostile(root: Path, long: bool) -> list[Figure]:
    """Hostile answers through the whole line: nothing raises, pages escape, files stay in place."""
    from luigi import configuration

    from pipeline.cli import inspect, status, verify

    world.enter(root)
    settings = configuration.get_config()
    settings.set("engine", "backend", "tests.chaos.hostile:engine")
    settings.set("Propose", "num_rollouts", "170" if long else "20")
    for key in ("max_unparsed_share", "fail_fast_unparsed_share"):
        settings.set("Propose", key, "1.0")
    settings.set("BuildMCQ", "max_lost_share", "1.0")
    settings.set("BuildMCQ", "vocabulary", "open")
    made = world.stages()
    names = ("Download", "Split", "Propose", "BuildMCQ", "Evaluate", "Report")
    world.preload(made[name] for name in names)
    raised = 0
    for name in names:
        if sentence := world.run(made[name]):
            raised += 1
            print(f"hostile: {name}: {sentence[-3000:]}")
    if raised:
        return [Figure("hostile", "stages that failed", raised, 0)]
    from tasks.tables import shards

    strings = len(shards.read(made["Propose"].folder, "rollouts", ["rollout"]))
    strings += len(shards.read(made["Evaluate"].folder, "predictions", ["mode"]))
    pages = list(made["Report"].folder.glob("*.html"))
    for name in ("Propose", "BuildMCQ", "Evaluate"):
        page = root / f"{name}.html"
        page.write_text(inspect.page(made[name].folder, 2000), encoding="utf-8")
        pages.append(page)
    acting = sum(len(_acting(page.read_text(encoding="utf-8"))) for page in pages)
    strange = [p for p in (root / "artifacts").rglob("*") if not re.fullmatch(r"[\w.+-]+", p.name)]
    allowed = {"artifacts", "cards", "luigi.cfg", "attempts.log", *(p.name for p in pages)}
    outside = {p.name for p in root.iterdir()} - allowed
    broken = verify.check(root / "artifacts", list(status.artifacts(root / "artifacts")))
    log = "".join(path.read_text() for path in (root / "artifacts").rglob("run.log"))
    for path in (root / "artifacts").rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    return [
        Figure("hostile", "hostile strings", strings),
        Figure("hostile", "stages that failed", raised, 0),
        Figure("hostile", f"things that would act, in {len(pages)} pages", acting, 0),
        Figure("hostile", "files with odd names, or outside their folder", len(strange) + len(outside), 0),
        Figure("hostile", "problems that verify finds", len(broken), 0),
        Figure("hostile", "control characters in logs", len(re.findall("[\x00-\x08\x1b\x7f]", log)), 0),
    ]  # fmt: skip


class _Finder(html.parser.HTMLParser):
    """Elements and attributes that carry the mark where a browser would act on them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        if tag in ("base", "iframe", "object", "embed", "link"):
            self.found.append(tag)
        for name, value in attrs:
            acts = name.startswith("on") or (
                name in ("src", "href", "style") and MARK in (value or "")
            )
            if acts or (value or "").strip().lower().startswith("javascript:"):
                self.found.append(f"{tag} {name}")

    def handle_data(self, data: str) -> None:
        if self._in in ("script", "style") and MARK in data:
            self.found.append(f"in {self._in}")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""


def _acting(text: str) -> list[str]:
    finder = _Finder()
    finder.feed(text)
    policies = text.count("Content-Security-Policy")
    return finder.found + ([] if policies == 1 else [f"{policies} content policies"])
