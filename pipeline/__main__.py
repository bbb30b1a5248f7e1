"""Look at what runs left behind, check it, and tidy up.

python -m pipeline status             the graph as a tree: done, partial, stale and why; what a run would do
python -m pipeline plan               images, rollouts, tokens, steps, hours and memory of a run to come
python -m pipeline rehearse           what a run would meet first, tried without its GPUs: ready, or what to mend
python -m pipeline results            the last report's figures, and where everything lies
python -m pipeline inspect build_mcq  counts, columns and sample rows of a stage's current artifact,
                                      of all or of those that fit --where; with --page as a page with
                                      images, for build_mcq a page of questions to filter
python -m pipeline verify             every checksum, row count and reference between artifacts;
                                      --quick: names and sizes of the files alone
python -m pipeline diff A B           two artifacts of a stage: settings, counts, files that differ
python -m pipeline invalidate propose delete a stage's current artifact, so that it is made again
python -m pipeline gc                 what nothing current refers to, and working folders that no run
                                      would go on from; --delete to delete them
python -m pipeline predict PHOTO...   what a policy says is on images

Each has --help with examples, and --json. Exit codes: 0; 1 for an error, with verify for damage, with
predict for an image that could not be read; 2 for a wrong command line.
"""

import argparse
import io
import math
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.cli import predict
from pipeline.cli.commands import (
    collect_garbage,
    invalidate_stage,
    show_differences,
    show_plan,
    show_rehearsal,
    show_status,
    verify_artifacts,
)
from pipeline.cli.show import configured_root, show_report, show_stage
from tasks.runtime.settings import nearest


def parser() -> argparse.ArgumentParser:
    """The parser of the command line: every command with its options and examples."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *examples: str) -> argparse.ArgumentParser:
        lines = "\n".join(f"  python -m pipeline {example}" for example in examples or (name,))
        added = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"examples:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--dataset", help="a data card's name; default: that of luigi.cfg")
        added.add_argument(
            "--recipe", metavar="FILES", help="read over luigi.cfg, separated by commas"
        )
        added.add_argument("--json", action="store_true", help="print JSON, for scripts")
        return added

    results = command("results", "the last report's figures and the folders")
    commands.choices["where"] = results  # its name in former versions
    status = command(
        "status",
        "the graph as a tree, and what a run would do",
        "status", "status Compare", "status Train --method virft --refresh-round 0 --json",
    )  # fmt: skip
    status.add_argument(
        "task", nargs="?", default="TrainDiVE", help="a task of luigi's; default: TrainDiVE"
    )
    status.add_argument("--method", help="default: that of luigi.cfg")
    status.add_argument("--seed", type=int, help="default: that of luigi.cfg")
    status.add_argument("--refresh-round", type=int, help="of a stage with rounds")
    plan = command(
        "plan",
        "what a run will take",
        "plan --recipe training/recipes/paper_7b.cfg",
        "plan --images 1000000 --scale 8 64 512 --gpus 8 --tokens-per-second 8000",
    )
    plan.add_argument("--method", help="default: that of luigi.cfg")
    plan.add_argument("--seed", type=int, help="default: that of luigi.cfg")

    def number(option: str, kind: Any, help: str, **more: Any) -> None:
        plan.add_argument(option, type=kind, help=help, **{"default": 0, **more})

    number("--tokens-per-second", _amount, "written by the engine, all GPUs together")
    number("--update-tokens-per-second", _amount, "of gradient steps, read and written")
    number("--answer-tokens", _count, "default: a quarter of the limit")
    number("--chars-per-token", _amount, "without a tokenizer", default=4.0)
    plan.add_argument("--tokenizer", default="", help="a folder with one")
    number("--gpus", _count, "of the machine; default: the recipe's")
    number("--gpu-gb", _amount, "memory of each; the same")
    number("--images", _count, "of each set, assumed")
    number("--image-kb", _amount, "kB of one; default: as Download has")
    number("--scale", _count, "hours on so many GPUs each", nargs="+", default=(), metavar="GPUS")
    each = "of each stage; default: not counted"
    number("--engine-start", _amount, each, metavar="SECONDS")
    speed = "10^9 bytes a second and GPU of an all-reduce; default: not counted"
    number("--all-reduce-gb", _amount, speed, metavar="GB")
    checked = "images a second that Download checks; default: as measured on two cores"
    number("--download-rate", _amount, checked)
    rehearse = command(
        "rehearse",
        "try what a run would meet first: settings, lengths, memory, launcher, and one step at the "
        "model's widths with few layers; on a GPU also a trial of ten images",
        "rehearse --recipe training/recipes/one_gpu_lora.cfg --dataset cub",
        "rehearse --recipe training/recipes/paper_7b.cfg --dataset cub --no-step",
    )  # fmt: skip
    rehearse.add_argument("--method", help="default: that of luigi.cfg")
    rehearse.add_argument("--seed", type=int, help="default: that of luigi.cfg")
    rehearse.add_argument(
        "--no-step", action="store_true", help="make no model: settings, lengths and memory alone"
    )
    rehearse.add_argument(
        "--trial",
        choices=("auto", "yes", "no"),
        default="auto",
        help="run the real stages on ten images, with a stop and a resume; auto: where there is a GPU",
    )
    inspect = command(
        "inspect",
        "counts, columns and sample rows of an artifact",
        "inspect build_mcq",
        "inspect build_mcq --where 'truth_injected AND truth_share < 0.2' --page hard.html",
        "inspect propose --where \"finish_reason = 'length'\" --rows 10 --json",
        "inspect evaluate --where \"mode = 'two_step' AND NOT correct AND len(options) > 3\"",
    )
    inspect.add_argument("stage", help="a stage's folder name, or a path to an artifact")
    inspect.add_argument("--rows", type=int, help="sample rows a table; default: 3, a page: 100")
    inspect.add_argument(
        "--where",
        default="",
        metavar="CONDITION",
        help="only rows for which this condition in SQL (DuckDB's) holds; texts in single quotes",
    )
    inspect.add_argument("--questions", type=_count, default=300, help="questions on the page")
    inspect.add_argument(
        "--page", type=Path, metavar="FILE", help="write the rows as a page, with thumbnails"
    )
    verify = command(
        "verify", "checksums, counts and references", "verify", "verify propose", "verify --quick"
    )
    verify.add_argument(
        "stage", nargs="?", default="all", help="a stage's folder name; default: all"
    )
    verify.add_argument(
        "--quick", action="store_true", help="compare names and sizes of files alone; read none"
    )
    invalidate = command(
        "invalidate", "delete current artifacts", "invalidate propose --downstream"
    )
    invalidate.add_argument("stage", help="a stage's folder name (propose)")
    invalidate.add_argument("--downstream", action="store_true", help="and what was made from them")
    gc = command(
        "gc",
        "artifacts that nothing current refers to, and old working folders of runs that were cut off",
        "gc",
        "gc --delete",
        "gc --partial-older-than 0 --delete",
    )
    gc.add_argument("--delete", action="store_true", help="delete them; else only list them")
    gc.add_argument(
        "--partial-older-than",
        type=float,
        default=7.0,
        metavar="DAYS",
        help="a working folder stays so long after it was last written to, since a run with its "
        "settings goes on from it; default: 7",
    )
    diff = command("diff", "two artifacts of a stage", "diff PATH_A PATH_B")
    diff.add_argument("one", type=Path)
    diff.add_argument("other", type=Path)
    answer = command("predict", "what a policy says is on images", "predict photo.jpg")
    predict.add_arguments(answer)
    parser.set_defaults(known=[*commands.choices])
    return parser


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def _amount(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is no number above 0")


def main() -> None:
    """Parse the command line and run the command. A user's mistake ends in one sentence."""
    try:
        try:
            _main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `head` has closed the pipe
        # Not by signal(SIGPIPE, SIG_DFL): that ends predict, too, when an engine's process is gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
        sys.exit(128 + signal.SIGPIPE)


def _main() -> None:
    commands = parser()
    known = commands.get_default("known")
    first = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if first is not None and first not in known:
        print(f"error: no command {first!r}{nearest(first, known)}", file=sys.stderr)
        sys.exit(2)
    arguments = commands.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # for names with letters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments.recipe:
        os.environ["RECIPE"] = arguments.recipe
    from pipeline.artifacts.store import StageFailed

    try:
        code = _run(arguments)
    except (StageFailed, ValueError) as error:  # a damaged manifest; an invalid --where
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.exit(f"error: {error.filename or ''}: {error.strerror}")
    if code:
        sys.exit(code)


def _run(arguments: Any) -> int:
    """Run the command; returns the exit code."""
    coded = {
        "status": show_status,
        "plan": show_plan,
        "rehearse": show_rehearsal,
        "predict": predict.predict,
    }
    if arguments.command in coded:
        return coded[arguments.command](arguments)
    root, dataset = configured_root(arguments.dataset)
    folder = root / dataset
    if arguments.command == "verify":
        return verify_artifacts(root, folder, arguments)
    if arguments.command in ("results", "where"):
        show_report(folder, arguments.json)
    elif arguments.command == "inspect":
        show_stage(folder, arguments)
    elif arguments.command == "diff":
        show_differences(arguments)
    elif arguments.command == "invalidate":
        invalidate_stage(root, folder, arguments)
    else:
        collect_garbage(root, arguments)
    return 0


if __name__ == "__main__":
    main()
