"""Generates with an engine that may refuse requests: finds those, and records them with reasons.

A refused image stays in every count: it gets empty completions, and a row in
`<table>_refused.parquet`. While shards are written, each has such a table of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tasks.engines.base import Completion, Engine, EngineDied, Request, Sampling, valid_utf8
from tasks.runtime.errors import StageError, first_line
from tasks.tables import schemas, shards

REFUSED = "refused"  # finish reason of the completions of a refused image
EMPTY = Completion("", REFUSED, 0, 0.0)


class Enough(Protocol):
    """Decides when an image has enough samples. Worker processes get it pickled.

    `counts` are the numbers of samples after which it is called, in ascending order.
    """

    @property
    def counts(self) -> tuple[int, ...]: ...

    def __call__(self, key: str, completions: Sequence[Completion]) -> bool: ...

    def only(self, keys: Sequence[str]) -> "Enough":
        """The same rule for these images alone, so that a shard carries no others."""
        ...


def generate_in_instalments(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    refused: dict[str, str],
    enough: Enough | None = None,
) -> list[list[Completion]]:
    """At most `sampling.n` completions for every request: fewer where `enough` says so.

    A refused request is not sent again, and gets `n` empty completions.
    """
    answers: dict[str, list[Completion]] = {request.key: [] for request in requests}
    waiting, sampled = list(requests), 0
    counts = enough.counts if enough else ()
    for total in (*(count for count in counts if count < sampling.n), sampling.n):
        part = replace(reseeded(sampling, sampled), n=total - sampled)
        rows = generate_or_refuse(engine, waiting, part, refused) if waiting else []
        for request, row in zip(waiting, rows, strict=True):
            answers[request.key] += row
            if request.key in refused:
                answers[request.key] = [EMPTY] * sampling.n
        waiting = [
            request
            for request in waiting
            if request.key not in refused
            and not (enough and enough(request.key, answers[request.key]))
        ]
        sampled = total
    return list(answers.values())


def generate_or_refuse(
    engine: Engine, requests: Sequence[Request], sampling: Sampling, refused: dict[str, str]
) -> list[list[Completion]]:
    """Generate `sampling.n` completions for every request.

    When the engine refuses a batch, each half is tried alone, down to single requests. A request
    that is refused alone gets `n` empty completions, and `refused` the reason under its image id.
    """
    try:
        answers = engine.generate(requests, sampling)
        if [len(row) for row in answers] != [sampling.n] * len(requests):
            raise StageError(
                f"the engine gave {sum(map(len, answers))} answers to {len(requests)} images asked for "
                f"{sampling.n} each; a server must support n > 1"
            )
        return [_opened(engine, *pair) for pair in zip(requests, answers, strict=True)]
    except (StageError, EngineDied, MemoryError):
        raise
    except Exception as error:
        if len(requests) == 1:
            refused[requests[0].key] = first_line(error)
            return [[EMPTY] * sampling.n]
        half = len(requests) // 2
        return [
            answer
            for number, part in enumerate((requests[:half], requests[half:]))
            for answer in generate_or_refuse(
                engine, part, reseeded(sampling, number * half), refused
            )
        ]


def _opened(engine: Engine, request: Request, answers: list[Completion]) -> list[Completion]:
    """The completions with the engine's `opening`, which some servers have put back themselves.

    An answer that is kept to given letters has none.
    """
    opening = getattr(engine, "opening", "")
    if not opening or request.choices:
        return answers
    return [
        each if each.text.startswith(opening) else replace(each, text=opening + each.text)
        for each in answers
    ]


def check_prompt(engine: Engine, requests: Sequence[Request]) -> str:
    """Have the engine check the first of the requests whose image it takes, if it can check.

    Returns why it refuses the first image where it refuses them all, and else "". Raises StageError when
    the prompt cannot be answered.
    """
    if not hasattr(engine, "check"):
        return ""
    reason = ""
    for request in requests:
        try:
            engine.check(request)
        except ValueError as error:
            reason = reason or f"{request.key}: {first_line(error)}"
        else:
            return ""
    return reason


def reseeded(sampling: Sampling, number: int) -> Sampling:
    """The sampling of batch `number` of a shard: each batch after the first has another seed."""
    return replace(sampling, seed=(sampling.seed + 7919 * number) % 2**31)


def of_shard(path: Path) -> Path:
    """The file with the images that the engine refused in the shard at `path`."""
    return path.with_name(f"refused-{path.name}")


def write(path: Path, refused: dict[str, str]) -> None:
    """Write the refused images of the shard at `path`; no file when there are none."""
    of_shard(path).unlink(missing_ok=True)  # left by an earlier attempt at this shard
    _write(of_shard(path), {key: valid_utf8(reason) for key, reason in refused.items()})


def gather(output: Path, table: str, paths: Sequence[Path]) -> None:
    """Move the refused images of all shards into one table; no file when there are none."""
    gathered = output / f"{table}_refused.parquet"
    by_shard = [path for path in map(of_shard, paths) if path.exists()]
    # An earlier run may have stopped halfway through this; its rows are kept.
    sources = [*([gathered] if gathered.exists() else []), *by_shard]
    reasons = {
        row["image_id"]: row["reason"]
        for path in sources
        for row in shards.read_file(path).to_pylist()
    }
    _write(gathered, {key: reasons[key] for key in sorted(reasons)})
    for path in by_shard:
        path.unlink()


def first(output: Path, table: str, count: int = 10) -> str:
    """The first refused images with their reasons, as one text."""
    path = output / f"{table}_refused.parquet"
    rows = shards.read_file(path).to_pylist()[:count] if path.exists() else []
    return "; ".join(f"{row['image_id']}: {row['reason']}" for row in rows)


def _write(path: Path, reasons: dict[str, str]) -> None:
    rows = [{"image_id": key, "reason": reason} for key, reason in reasons.items()]
    shards.write(path, rows, schemas.refused())
