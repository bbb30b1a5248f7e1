"""`python -m pipeline predict`: images in, a table or JSON out.

Nothing heavy is imported before the command line is understood and the images are found.
"""

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.evaluation.settings import PREDICT_MODES
from tasks.language.prompts import PROMPTS

if TYPE_CHECKING:
    from tasks.predict import Prediction, Predictor

SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2",
    ".avif", ".jfif",
}  # fmt: skip
REASONING_LINES = 3  # shown of a thought; JSON has all of it
WIDEST = 40  # columns of an image's name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    parser.add_argument("--policy", help="a folder or hub id; default: the newest trained policy")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--card", help="what they may show; default: the policy's own card")
    shown.add_argument("--classes", type=Path, metavar="FILE", help="the same, one name a line")
    parser.add_argument("--noun", default="object", help="with --classes: what they show (bird)")
    parser.add_argument("--kind", default="kind", help="with --classes: what is asked (species)")
    parser.add_argument("--mode", choices=PREDICT_MODES, default="two_step")
    parser.add_argument("--prompt", choices=PROMPTS, help="show the names, or not")
    parser.add_argument("--num-rollouts", type=int, metavar="N", help="samples an image")
    parser.add_argument("--backend", help="vllm, transformers or server")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="prompt and answer together")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")


def predict(arguments: argparse.Namespace) -> int:
    """Answer about every image. Returns 0, or 1 when one could not be read or asked about."""
    from tasks.runtime.command import quiet_libraries
    from tasks.runtime.errors import StageError

    quiet_libraries()
    paths = list(dict.fromkeys(found for given in arguments.images for found in files(given)))
    table = Table(paths) if not arguments.json else None
    found: list[Prediction] = []
    try:
        with opened(arguments) as predictor:
            with shown_progress(len(paths)) as bar:
                for each in predictor.stream(paths):
                    found.append(each)
                    with bar.external_write_mode(sys.stdout):
                        if table and len(found) == 1:
                            print(table.head())
                        if table:
                            print("\n".join(table.lines(each)), flush=True)
                    bar.update(1)
            limit = predictor.engine_settings.max_new_tokens
            about = {"policy": str(predictor.policy), "card": predictor.card.name}
    except StageError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        facts = {**about, "mode": arguments.mode, "predictions": [f.as_dict() for f in found]}
        print(json.dumps(facts, indent=1, ensure_ascii=False))
    print("\n".join(summary(found, limit)), file=sys.stderr)
    return 1 if any(each.error for each in found) else 0


def opened(arguments: argparse.Namespace) -> "Predictor":
    """The policy to ask, as Evaluate asks it unless said otherwise.

    Without a luigi.cfg in this folder a policy must be named, and says itself how it was trained.
    """
    from tasks.engines import policies
    from tasks.evaluation.inputs import engine_settings
    from tasks.evaluation.settings import PredictSettings
    from tasks.predict import Predictor

    policy, configured, evaluated = arguments.policy, None, {}
    if Path("luigi.cfg").is_file():
        from pipeline.settings import run
        from pipeline.tasks import Evaluate, engine

        own = Evaluate(dataset=arguments.dataset) if arguments.dataset else Evaluate()
        os.environ.setdefault("OMP_NUM_THREADS", str(run().cpu_threads))
        policy = policy or str(_newest(own))
        configured, evaluated = engine().settings, own.settings.values()
    elif not policy:
        sys.exit("error: no luigi.cfg here, so no newest policy; name one: --policy FOLDER")
    folder = policies.local(policy, arguments.backend or (configured.backend if configured else ""))
    asked = configured or engine_settings(folder)
    if style := policies.recipe(folder).get("prompt_style"):  # it is asked as it was trained
        asked = replace(asked, prompt_style=style)
    return Predictor(
        folder,
        card=arguments.card,
        classes=classes(arguments.classes),
        noun=arguments.noun,
        kind=arguments.kind,
        engine=replace(asked, **given(arguments, "backend", "max_new_tokens", "max_model_len")),
        settings=PredictSettings.of(
            evaluated | given(arguments, "mode", "prompt", "num_rollouts", "seed")
        ),
    )


def given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of some options that the command line says."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def classes(file: Path | None) -> list[str] | None:
    """The names in a file, one a line; leaves when it cannot be read."""
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: --classes {file} cannot be read ({error})")


def _newest(own: Any) -> Path:
    """The policy of the last round that was trained; leaves when there is none."""
    from pipeline.settings import run

    root = Path(run().artifacts) / "+".join(own.names)
    found = sorted(
        (root / own.method).glob("round*/train/current"),
        key=lambda path: int(path.parts[-3].removeprefix("round")),
    )
    if not found:
        sys.exit(
            f"error: no trained policy under {root / own.method}; run: make train, or name one: "
            "--policy FOLDER"
        )
    return found[-1].resolve()


def shown_progress(total: int) -> Any:
    """A bar for a person who waits; none in a log."""
    from tqdm import tqdm

    return tqdm(total=total, desc="predict", unit=" images", disable=not sys.stderr.isatty())


def files(given: Path) -> Iterator[Path]:
    """The file itself, or the image files at any depth of a folder, sorted."""
    if not given.is_dir():
        yield given
        return
    found = [p for p in sorted(given.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    # A folder without images is named as what could not be read.
    yield from found or [given]


class Table:
    """The lines of a prediction for a terminal, aligned over all images.

    Images are shown by their file's name alone where that tells them apart.
    """

    def __init__(self, paths: Sequence[Path], width: int = 0):
        self.width = width or max(60, min(shutil.get_terminal_size((110, 24)).columns, 140))
        self.short = len({path.name for path in paths}) == len(paths)
        names = [self._name(str(path)) for path in paths]
        self.column = min(WIDEST, max([len("image"), *map(len, names)]))

    def head(self) -> str:
        """What stands above the columns."""
        return f"{'image':{self.column}}  sure  answer"

    def lines(self, found: "Prediction") -> list[str]:
        """The answer with its share of the votes, the candidates, and the reasoning below."""
        name = self._name(found.image)
        name = name if len(name) <= self.column else "…" + name[1 - self.column :]
        sure = "" if found.confidence is None or not found.answer else f"{found.confidence:.0%}"
        if found.error:
            return [f"{name:{self.column}}        not answered: {printable(found.error)}"]
        others = ", ".join(f"“{text}” {count}" for text, count in found.other_answers)
        below = {"votes": ", ".join(f"{other} {count}" for other, count in found.candidates)}
        below |= {"" if found.answer else "said": others, "saw": found.reasoning}
        said = f"said “{found.text}”, " if found.text else ""
        answer = printable(found.answer or f"no class ({said}{found.status})")
        return [
            f"{name:{self.column}}  {sure:>4}  {answer}",
            *(
                line
                for label, text in below.items()
                for line in self._wrapped(label, printable(text))
                if label
            ),
        ]

    def _name(self, image: str) -> str:
        return printable(Path(image).name if self.short else image)

    def _wrapped(self, label: str, text: str) -> list[str]:
        indent = " " * (self.column + 8)
        room = max(20, self.width - len(indent) - 7)
        wrapped = textwrap.wrap(
            text, room, max_lines=REASONING_LINES, placeholder=" …", break_on_hyphens=False
        )
        labels = [f"{label:5}  ", *[" " * 7] * len(wrapped)]
        return [indent + first + line for first, line in zip(labels, wrapped, strict=False)]


def summary(found: Sequence["Prediction"], limit: int) -> list[str]:
    """What happened to all images, and what to do about answers that were cut."""
    counts = Counter(
        "not answered" if each.error else "named" if each.answer else "without a class"
        for each in found
    )
    kinds = [kind for kind in ("named", "without a class", "not answered") if counts[kind]]
    noun = "image" if len(found) == 1 else "images"
    told = [f"{len(found)} {noun}: " + ", ".join(f"{counts[kind]} {kind}" for kind in kinds)]
    told += [f"  {printable(each.image)}: {printable(each.error)}" for each in found if each.error]
    cut = sum(each.cut for each in found)
    total = sum((each.num_rollouts or 1) for each in found if not each.error)
    if cut > 0.05 * total:
        told.append(
            f"{cut} answers were cut at {limit} tokens: --max-new-tokens N lets them end (and "
            "--max-model-len N makes room)"
        )
    return told


def printable(text: str) -> str:
    """On one line, without what a terminal would take for commands."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
