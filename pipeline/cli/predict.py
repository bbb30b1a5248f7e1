"""The command `python -m pipeline predict`: predicts images, and prints a table or JSON.

Heavy libraries are imported only after the command line is parsed and the images are found.
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
    from tasks.evaluation.prediction import Prediction
    from tasks.predict import Predictor

SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2",
    ".avif", ".jfif",
}  # fmt: skip
REASONING_LINES = 3  # lines of reasoning in the table; JSON has all of it
WIDEST = 40  # columns for an image's name, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    parser.add_argument("--policy", help="a folder or hub id; default: the newest trained policy")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--card", help="what they may show; default: the policy's own card")
    shown.add_argument("--classes", type=Path, metavar="FILE", help="the same, one name a line")
    parser.add_argument("--noun", default="object", help="with --classes: what they show (bird)")
    parser.add_argument("--kind", default="kind", help="with --classes: what is asked (species)")
    parser.add_argument("--mode", choices=PREDICT_MODES, default="two_step")
    parser.add_argument(
        "--thresholds", help="with --mode adaptive: an Evaluate artifact, or its thresholds.json"
    )
    parser.add_argument("--num-options", type=int, metavar="K", help="of the question, at most")
    parser.add_argument("--prompt", choices=PROMPTS, help="show the names, or not")
    parser.add_argument("--num-rollouts", type=int, metavar="N", help="samples an image")
    parser.add_argument("--backend", help="vllm, transformers or server")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="prompt and answer together")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")


def predict(arguments: argparse.Namespace) -> int:
    """Predict every image and print the results. Returns 1 if an image failed, else 0."""
    from tasks.runtime.command import quiet_libraries
    from tasks.runtime.errors import StageError

    quiet_libraries()
    paths = list(dict.fromkeys(path for place in arguments.images for path in files(place)))
    table = Table(paths) if not arguments.json else None
    predictions: list[Prediction] = []
    try:
        with opened(arguments) as predictor:
            with shown_progress(len(paths)) as bar:
                for each in predictor.stream(paths):
                    predictions.append(each)
                    with bar.external_write_mode(sys.stdout):
                        if table and len(predictions) == 1:
                            print(table.head())
                        if table:
                            print("\n".join(table.lines(each)), flush=True)
                    bar.update(1)
            limit = predictor.engine_settings.max_new_tokens
            about = {"policy": str(predictor.policy), "card": predictor.card.name}
    except StageError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        values = [each.as_dict() for each in predictions]
        facts = {**about, "mode": arguments.mode, "predictions": values}
        print(json.dumps(facts, indent=1, ensure_ascii=False))
    print("\n".join(summary(predictions, limit)), file=sys.stderr)
    return 1 if any(each.error for each in predictions) else 0


def opened(arguments: argparse.Namespace) -> "Predictor":
    """The Predictor that the command line asks for, with Evaluate's settings as defaults.

    Without a luigi.cfg in this folder, `--policy` is required, and the defaults come from the recipe
    that the policy was trained with.
    """
    from tasks.engines import policies
    from tasks.evaluation.prediction import engine_settings
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
    engine_config = configured or engine_settings(folder)
    if style := policies.recipe(folder).get("prompt_style"):  # the wording of its training
        engine_config = replace(engine_config, prompt_style=style)
    engine_options = options_of(arguments, "backend", "max_new_tokens", "max_model_len")
    own_options = options_of(
        arguments, "mode", "prompt", "num_rollouts", "num_options", "seed", "thresholds"
    )
    return Predictor(
        folder,
        card=arguments.card,
        classes=classes(arguments.classes),
        noun=arguments.noun,
        kind=arguments.kind,
        engine=replace(engine_config, **engine_options),
        settings=PredictSettings.of(evaluated | own_options),
    )


def options_of(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The values of some options, without those that the command line leaves out."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def classes(file: Path | None) -> list[str] | None:
    """The class names in a file, one a line. Exits with a sentence when it cannot be read."""
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: --classes {file} cannot be read ({error})")


def _newest(own: Any) -> Path:
    """The policy of the last trained round. Exits with a sentence when there is none."""
    from pipeline.settings import run

    root = Path(run().artifacts) / "+".join(own.names)
    trained = sorted(
        (root / own.method).glob("round*/train/current"),
        key=lambda path: int(path.parts[-3].removeprefix("round")),
    )
    if not trained:
        sys.exit(
            f"error: no trained policy under {root / own.method}; run: make train, or name one: "
            "--policy FOLDER"
        )
    return trained[-1].resolve()


def shown_progress(total: int) -> Any:
    """A progress bar on a terminal; none in a log."""
    from tqdm import tqdm

    return tqdm(total=total, desc="predict", unit=" images", disable=not sys.stderr.isatty())


def files(place: Path) -> Iterator[Path]:
    """The file `place`, or the image files at any depth of the folder `place`, sorted."""
    if not place.is_dir():
        yield place
        return
    images = [p for p in sorted(place.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    # A folder without images is reported as an image that cannot be read.
    yield from images or [place]


class Table:
    """Formats predictions for a terminal, aligned over all images.

    Images are shown by file name alone where no two have the same.
    """

    def __init__(self, paths: Sequence[Path], width: int = 0):
        self.width = width or max(60, min(shutil.get_terminal_size((110, 24)).columns, 140))
        self.short = len({path.name for path in paths}) == len(paths)
        names = [self._name(str(path)) for path in paths]
        self.column = min(WIDEST, max([len("image"), *map(len, names)]))

    def head(self) -> str:
        """The line with the columns' names."""
        return f"{'image':{self.column}}  sure  answer"

    def lines(self, each: "Prediction") -> list[str]:
        """The answer with its share of the votes; below it the candidates and the reasoning."""
        name = self._name(each.image)
        name = name if len(name) <= self.column else "…" + name[1 - self.column :]
        sure = "" if each.confidence is None or not each.answer else f"{each.confidence:.0%}"
        if each.error:
            return [f"{name:{self.column}}        not answered: {printable(each.error)}"]
        others = ", ".join(f"“{text}” {count}" for text, count in each.other_answers)
        below = {"votes": ", ".join(f"{other} {count}" for other, count in each.candidates)}
        below |= {"" if each.answer else "said": others, "saw": each.reasoning}
        quoted = f"said “{each.text}”, " if each.text else ""
        answer = printable(each.answer or f"no class ({quoted}{each.status})")
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


def summary(predictions: Sequence["Prediction"], limit: int) -> list[str]:
    """Counts of named, unnamed and failed images, and advice when many answers were cut."""
    counts = Counter(
        "not answered" if each.error else "named" if each.answer else "without a class"
        for each in predictions
    )
    kinds = [kind for kind in ("named", "without a class", "not answered") if counts[kind]]
    noun = "image" if len(predictions) == 1 else "images"
    lines = [f"{len(predictions)} {noun}: " + ", ".join(f"{counts[kind]} {kind}" for kind in kinds)]
    failed = [each for each in predictions if each.error]
    lines += [f"  {printable(each.image)}: {printable(each.error)}" for each in failed]
    cut = sum(each.cut for each in predictions)
    total = sum((each.num_rollouts or 1) for each in predictions if not each.error)
    if cut > 0.05 * total:
        lines.append(
            f"{cut} answers were cut at {limit} tokens: --max-new-tokens N lets them end (and "
            "--max-model-len N makes room)"
        )
    return lines


def printable(text: str) -> str:
    """The text on one line, without control characters that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
