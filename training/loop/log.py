"""The callback that records a run: progress, one log row a step, completions, checkpoints."""

import statistics
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tasks.runtime.interrupts import stop_asked
from tasks.runtime.progress import doing, progress
from tasks.tables import schemas, shards
from training.loop import checkpoints, diagnosis
from training.loop.validation import Watch

# Trainer's log key -> our column (tasks.tables.schemas.train_log).
LOGGED = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "reward": "reward",
    "reward_std": "reward_std",
    "dead_groups": "dead_group_share",
    "replaced_groups": "replaced_group_share",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "clipped_share",
    "base_drift": "base_drift",
    "tokens_per_second": "tokens_per_second",
    "seconds/generation": "seconds_generation",
    "seconds/reward": "seconds_reward",
    "step_time": "seconds",
}


class Finished(Exception):
    """Raised when a resumed round has no step left: it was killed after training, before saving."""


class Recorder(TrainerCallback):
    """Trainer callback that shows progress, logs, warns, writes completions and marks checkpoints.

    The round runs from step `start` to step `stop`. `rewards` are the names of the rewards. `keep` is
    how many complete checkpoints stay. `watch` validates on the way, if set. `log` has a row for every
    step of the round, also for those before an interruption.
    """

    def __init__(
        self,
        output: Path,
        trainer: Any,
        rewards: list[str],
        *,
        start: int,
        stop: int,
        keep: int,
        watch: Watch | None,
    ):
        self.output, self.trainer, self.rewards = output, trainer, rewards
        self.start, self.stop, self.keep, self.watch = start, stop, keep, watch
        self.bar: Any = None
        self.log: list[dict[str, Any]] = []
        self.warned: set[str] = set()
        self.written = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.log = [self._row(entry) for entry in state.log_history if self._ours(entry)]
        if self.watch:
            self.watch.resume(state.log_history, self.start)
        if state.global_step >= self.stop:
            raise Finished
        if state.is_world_process_zero:
            done = state.global_step - self.start
            total = self.stop - self.start
            self.bar = progress(None, desc="train", total=total, unit="steps", done=done)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        entry = {**(logs or {}), "step": state.global_step}
        if not self._ours(entry):
            return
        if (spread := self._spread()) is not None:
            state.log_history[-1]["advantage_spread"] = entry["advantage_spread"] = spread
        self.log.append(self._row(entry))
        if self.bar is None:
            return
        row = self.log[-1]
        self.bar.set_postfix(self._live(row))
        for kind, sentence in diagnosis.warnings(self.log).items():
            if kind not in self.warned:
                self.bar.write(f"train: step {row['step']}: {sentence}", file=sys.stderr)
                self.warned.add(kind)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        doing("updating")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)
            self._write_completions(state.global_step)
        if state.global_step >= self.stop or (
            stop_asked() and self._on_boundary(state.global_step)
        ):
            control.should_save = control.should_training_stop = True
        if self.watch and self.watch.due(state.global_step, self.stop):
            control.should_save = True
        if control.should_save:
            doing("saving")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Validate, mark the checkpoint that the trainer just wrote, and delete old ones."""
        step = state.global_step
        folder = Path(args.output_dir) / f"checkpoint-{step}"
        if self.watch and self.watch.due(step, self.stop):
            doing("watching val images")
            accuracy = self.watch.look(self.trainer, step)
            for rows in (state.log_history, self.log):
                if rows and rows[-1].get("step") == step:
                    rows[-1] |= accuracy
        self.trainer.accelerator.wait_for_everyone()  # each process writes the states of its random generators
        if state.is_world_process_zero:
            if self.watch:
                state.save_to_json(str(folder / "trainer_state.json"))
            checkpoints.mark_complete(folder)
            best = {self.watch.best_step} if self.watch and self.watch.best_step else set()
            checkpoints.rotate(self.output, self.keep, best)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _ours(self, entry: dict[str, Any]) -> bool:
        return "loss" in entry and entry["step"] > self.start

    def _row(self, entry: dict[str, Any]) -> dict[str, Any]:
        row = {"step": entry["step"], **{ours: entry.get(key) for key, ours in LOGGED.items()}}
        row |= {f"reward/{name}": entry.get(f"rewards/{name}/mean") for name in self.rewards}
        parts = [row["seconds_generation"], row["seconds_reward"]]
        if row["seconds"] is not None and None not in parts:
            row["seconds_update"] = max(0.0, row["seconds"] - sum(parts))
        for key in ("advantage_spread", "val_accuracy", "val_unreadable"):
            row[key] = entry.get(key)
        return row

    def _live(self, row: dict[str, Any]) -> dict[str, str]:
        """The figures beside the progress bar."""
        parts = {name.split(":")[-1]: row.get(f"reward/{name}") for name in self.rewards}
        values = {"reward": row["reward"], **parts}
        length = {"length": f"{row['completion_length'] or 0:.0f}"}
        return {
            name: f"{value:.2f}" for name, value in values.items() if value is not None
        } | length

    def _spread(self) -> float | None:
        advantages = list(self.trainer._logs["advantages"])
        return statistics.pstdev(advantages) if advantages else None

    def _uses(self) -> int:
        """Micro-batches that one generation batch is used for, over all its iterations."""
        return self.trainer.args.steps_per_generation * self.trainer.num_iterations

    def _on_boundary(self, step: int) -> bool:
        """Whether the next step begins with new completions, so that a run can resume from here."""
        return step * self.trainer.args.gradient_accumulation_steps % self._uses() == 0

    def _write_completions(self, step: int) -> None:
        """Write each generation batch to one file, numbered by the first step that used it.

        Groups that dynamic sampling replaced are written too, with an advantage of 0.
        """
        batch = (step * self.trainer.args.gradient_accumulation_steps - 1) // self._uses()
        if batch == self.written:
            return
        self.written = batch
        logged = self.trainer._logs
        ids = list(logged["extra"]["mcq_id"])
        columns = {
            "image_id": list(logged["extra"]["image_id"]),
            "mcq_id": ids,
            "completion": [_text(completion) for completion in logged["completion"]],
            "advantage": list(logged["advantages"]),
            **{f"reward/{name}": list(logged["rewards"][name]) for name in self.rewards},
        }
        rows = [
            {"step": step, **{key: values[i] for key, values in columns.items()}}
            for i in range(len(ids))
        ]
        rows += [{"step": step, **row} for row in getattr(self.trainer, "replaced", [])]
        path = shards.shard_path(self.output, "completions", step)
        shards.write(path, rows, schemas.completions(self.rewards))


class SupervisedRecorder(Recorder):
    """Recorder of a supervised run, which has no completions and no rewards."""

    def _live(self, row: dict[str, Any]) -> dict[str, str]:
        return {"loss": f"{row['loss']:.3f}"}

    def _spread(self) -> None:
        return None

    def _uses(self) -> int:
        return self.trainer.args.gradient_accumulation_steps

    def _write_completions(self, step: int) -> None:
        return None


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
