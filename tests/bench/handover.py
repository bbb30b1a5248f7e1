"""What handing a round's training over to the next costs: bytes on the disk, and memory.

    python -m tests.bench.handover [--mb 500] [--json FILE]

A model and an AdamW optimizer with MB of states; a checkpoint of both, the end of the round
(`handover.keep`) and the next round's start (`handover.resume`), each in a process of its own.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.bench.results import write
from training.loop import training_state

try:
    from training.loop import state_files
except ImportError:  # to measure a version without it
    state_files = None
TENSOR = 1 << 20  # values


def checkpoint(folder: Path, megabytes: int) -> int:
    """A finished checkpoint, as the trainer leaves one; returns what the training itself holds."""
    place = folder / "checkpoint-1"
    place.mkdir()
    parameters = [torch.nn.Parameter(torch.zeros(TENSOR)) for _ in range(megabytes // 8)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    held = resident()
    if state_files is None:
        torch.save(optimizer.state_dict(), place / "optimizer.pt")
    else:
        state_files.write(place / "optimizer", optimizer.state_dict())
    weights = {str(number): each.detach() for number, each in enumerate(parameters)}
    save_file(weights, place / "model.safetensors")
    (place / "config.json").write_text("{}")
    torch.save({"cpu": torch.get_rng_state()}, place / "rng_state.pth")
    (place / "trainer_state.json").write_text("{}")
    return held


def keep(folder: Path, _: int) -> None:
    """The end of the round."""
    place = folder / "checkpoint-1"
    training_state.keep(place, place, folder / "policy", weights=True)


def resume(folder: Path, _: int) -> None:
    """The start of the next."""
    training_state.resume(folder / "policy", folder / "next", 1)


def on_disk(folder: Path) -> int:
    """Bytes below a folder, each file once."""
    found = {p.stat().st_ino: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return sum(found.values())


def resident() -> int:
    """Bytes of memory that this process holds now, from where its peak counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes this process has held since."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if name in line).split()[1]) * 1024


def measured(step, folder: Path, megabytes: int, told) -> None:
    """Run a step in this process; tell its seconds and the memory that it took on top."""
    before, start = resident(), time.perf_counter()
    held = step(folder, megabytes) or before
    told.send((time.perf_counter() - start, peak() - held))


def main() -> None:
    """Print a line a step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mb", type=int, default=500, help="of optimizer states")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        for step in (checkpoint, keep, resume):
            before = on_disk(folder)
            ours, theirs = multiprocessing.Pipe()
            context = multiprocessing.get_context("spawn")
            process = context.Process(target=measured, args=(step, folder, given.mb, theirs))
            process.start()
            seconds, memory = ours.recv()
            process.join()
            written = on_disk(folder) - before
            print(
                f"{step.__name__:12}{written / 1e6:10.1f} MB written{memory / 1e6:10.1f} MB of memory"
                f"{seconds:8.2f} s"
            )
            for what, value, unit in (
                ("written", written / 1e6, "MB"),
                ("memory", memory / 1e6, "MB"),
                ("seconds", seconds, "s"),
            ):
                figure = f"{step.__name__}, {what}"
                figures.append({"figure": figure, "value": value, "goal": None, "unit": unit})
    write(given.json, figures, {"mb": given.mb})


if __name__ == "__main__":
    main()
