"""Runs one round of training around a trainer: the code that GRPO and the SFT baseline share.

A session verifies the frozen shards and loads the model. It resumes a killed run from its last
complete checkpoint, and a later round from the training state of the round before. It validates on
val images, proves that frozen weights did not change, and writes the policy folder.
"""

import contextlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from data_cards import load
from tasks.engines import adapters
from tasks.runtime import waiting
from tasks.runtime.errors import StageError
from tasks.runtime.interrupts import shard_by_shard, stop_if_asked
from tasks.runtime.protocol import save_stats
from tasks.tables import manifest, schemas, shards
from tasks.tables.pixels import Decoder, picture_size
from training.data.dataset import Place, Questions, Then
from training.data.refused import left_out
from training.loop import checkpoints, policy_folder, training_state
from training.loop.log import Finished, Recorder
from training.loop.validation import Watch, val_sample
from training.model import loading, processors, sharding, trainable
from training.resources import needs
from training.settings import Round, TrainSettings

CACHE = "cache"  # folder for the questions' memory maps; deleted with the checkpoints at the end
PLACE = "place.json"  # the place in the order of questions from which the next round goes on


class Session:
    """One round of training, with its cards, processor, settings and steps.

    The round runs from step `start` to step `stop`, of `total` steps in all rounds. The model is loaded
    from the policy `origin`. `settings` have steps in place of epochs. With `carry_over` that is the policy that round 0 started from, and the
    round before hands over its training state. Raises StageError for damaged shards.
    """

    def __init__(self, output: Path, round: Round, settings: TrainSettings):
        disable_progress_bar()  # the libraries' bars: one a stage is enough
        disable_progress_bars()
        self.output, self.round = output, round
        self.cards = [load(name) for name in round.card.split("+")]
        for folder in round.mcq:
            verify(folder)
        settings.check_epochs(round.rounds)
        settings = settings.with_steps(sum(shards.count_rows(f, "mcq") for f in round.mcq))
        self.settings = settings
        carry_over, steps = settings.carry_over, settings.steps
        self.start = round.refresh_round * steps if carry_over else 0
        self.stop = self.start + steps
        self.total = round.rounds * steps if carry_over else steps
        self.origin = round.base if carry_over else round.policy
        self.processor = processors.load_processor(self.origin)
        processors.check(self.processor, self.cards, round.prompt_style)

    def count_tokens(self, text: str) -> int:
        """The number of the policy's tokens in a text, without special ones."""
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def questions(self, style: str | None) -> Questions:
        """The frozen questions: multiple-choice in the prompt style `style`, or open with None.

        Raises StageError where the policy's processor refuses the images of too many.
        """
        questions = Questions(
            self.round.mcq,
            self.cards,
            style,
            seed=self.round.seed,
            pairs_in=self.settings.questions_per_step if self.round.pairs else 0,
            limit=self.settings.max_questions,
            cache=self.output / CACHE,
            decode=Decoder(self.processor),
        )
        total = len(questions.image_ids) + len(questions.refused)
        left_out(questions.refused, total, "questions", "train")
        return questions

    def rows(self, questions: Questions, then: Then | None = None) -> Dataset:
        """The training rows of this round and, with `carry_over`, of all rounds, in order.

        The order goes on from where the round before ended. With `carry_over` the trainer's step count
        includes the rounds before, so it skips their rows, which stand first.
        """
        own = self.settings.steps * self.settings.questions_per_step  # of this round
        before = self.round.refresh_round * own
        carry_over = self.settings.carry_over
        left = (self.round.rounds - self.round.refresh_round) * own if carry_over else own
        skipped = before if carry_over else 0  # rows of earlier rounds, which the trainer skips
        place = self._place() if before else None
        rows = questions.rows(left, self.settings.order, then, after=place, skipped=skipped)
        self.place = questions.place(own)
        return rows

    def model(self, config: Any, largest: dict[str, Any]) -> tuple[Any, Any]:
        """The model and PEFT's configuration or None, after a memory check on the `largest` row."""
        if self.settings.check_memory:
            needs.check(self.origin, self.processor, largest, config, self.settings, self.output)
        with config.main_process_first(local=False, desc="adapters"), sharding.outside_deepspeed():
            policy = adapters.merged_weights(self.origin, self.output / CACHE)
        with waiting.loading(f"train: loading {waiting.weights(policy)}"):
            return loading.load_model(policy, self.settings)

    def train(
        self,
        trainer: Any,
        kind: type[Recorder],
        names: list[str],
        before: Callable[[], Any] | None = None,
    ) -> Recorder:
        """Train to the round's last step; returns the recorder with the log.

        `kind` is the recorder's class and `names` are the rewards' names. `before` is called once the
        model is on its devices and sharded, before the first step. Raises StageError when frozen
        weights have changed, and Stopped after Ctrl-C.
        """
        if self.settings.quantized and not trainer.is_deepspeed_enabled:  # it keeps float32 copies
            trainable.hold_in_float32(trainer.model)
        if trainer.accelerator.is_main_process:
            model = trainer.accelerator.unwrap_model(trainer.model)
            print(f"train: {trainable.describe(model)}", flush=True)
            if self.settings.quantized:
                print(
                    "train: full weights made of this policy are the unquantised base with the "
                    "adapter, not the 4-bit weights that it is trained on",
                    flush=True,
                )
        recorder = kind(
            self.output,
            trainer,
            names,
            start=self.start,
            stop=self.stop,
            keep=self.settings.keep_checkpoints,
            watch=self.watch,
        )
        trainer.remove_callback(PrinterCallback)  # the recorder's line replaces its dictionaries
        start = AtStart(trainer, before)
        trainer.add_callback(start)
        trainer.add_callback(recorder)
        with contextlib.suppress(Finished), shard_by_shard("step"):
            trainer.train(resume_from_checkpoint=self._checkpoint(trainer))
            if trainer.state.global_step < self.stop:
                stop_if_asked()
        if hasattr(trainer, "base_keeper"):
            trainer.base_keeper.restore()
        if trainable.frozen_hash(trainer.model_wrapped) != start.untouched:
            raise StageError("weights that were to stay frozen have changed; a fault of this code")
        return recorder

    def finish(self, trainer: Any, recorder: Recorder, stats: dict[str, Any]) -> None:
        """Write policy, log, card and the next round's training state; every process must call it."""
        policy_folder.save(self.output, trainer, self.processor, self.origin, self.settings.dtype)
        last = self.output / checkpoints.FOLDER / f"checkpoint-{self.stop}"
        best = recorder.watch.best_step if recorder.watch else None
        kept = self._keep_best(trainer, last, self.stop if best is None else best)
        if not trainer.accelerator.is_main_process:
            return
        if self.settings.carry_over:
            masters = loading.keeps_masters(self.settings)
            training_state.keep(kept, last, self.output, weights=masters)
        (self.output / PLACE).write_text(json.dumps(self.place), encoding="utf-8")
        log = recorder.log
        shards.write(
            self.output / "train_log.parquet", log, schemas.train_log(list(recorder.rewards))
        )
        policy_folder.write_card(self.output, self.cards, self.round, self.settings, log)
        validated = [row for row in log if row["val_accuracy"] is not None]
        accuracies = {str(row["step"]): row["val_accuracy"] for row in validated}
        steps = [row["step"] for row in log[:1] + log[-1:]]
        save_stats(
            self.output,
            {"steps": steps, "policy_step": checkpoints.step_of(kept), "val_accuracy": accuracies}
            | stats,
        )
        if self.settings.push_to_hub:
            policy_folder.push(self.output, self.settings.push_to_hub)

    def _place(self) -> Place:
        """The place in the order of questions where the round before ended."""
        path = self.round.policy / PLACE
        try:
            epoch, image_id = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StageError(
                f"{self.round.policy} kept no training state to go on from; train that round again"
            ) from error
        return Place(epoch, image_id)

    @cached_property
    def watch(self) -> Watch | None:
        """The validation during training; None where [Train] watch_every is 0."""
        every, longest = self.settings.watch_every, self.settings.max_completion_length
        if not every:
            return None
        round = self.round
        drawn = val_sample(round.download, round.split, self.settings.watch_images, round.seed)
        decode, refused = Decoder(self.processor), {}
        for each in drawn:
            if reason := decode.refusal(*picture_size(each.image)):
                refused[each.image_id] = reason
        left_out(refused, len(drawn), "val images", "train", most=1)
        sample = [each for each in drawn if each.image_id not in refused]
        ends = processors.end_tokens(self.origin)
        return Watch(sample, self.cards, round.prompt_style, every, longest, ends)

    def _checkpoint(self, trainer: Any) -> str | None:
        """The checkpoint to resume from: this round's last, else the round before's state, else None."""
        checkpoint = checkpoints.last_complete(self.output)
        if checkpoint is not None:
            trainer.weights = checkpoint
        elif self.start:
            if trainer.accelerator.is_main_process:
                training_state.resume(
                    self.round.policy, self.output / checkpoints.FOLDER, self.start
                )
            trainer.accelerator.wait_for_everyone()
            checkpoint = self.output / checkpoints.FOLDER / f"checkpoint-{self.start}"
            places = (
                training_state.STATE / Path(training_state.WEIGHTS),
                Path(policy_folder.ADAPTER),
            )
            full = [self.round.policy / place for place in places]
            trainer.weights = next((p for p in full if p.exists()), self.round.policy)
        return str(checkpoint) if checkpoint else None

    def _keep_best(self, trainer: Any, last: Path, best_step: int) -> Path:
        """Write the best policy by val accuracy beside the last one, or in its place.

        Returns the checkpoint whose weights are the policy; every process must call it.
        """
        best = last.with_name(f"checkpoint-{best_step}")
        if best == last or not best.exists():
            return last
        beside, policy = ("best", last) if self.settings.keep_policy == "last" else ("last", best)
        common = (self.processor, self.origin, self.settings.dtype)
        if trainer.is_fsdp_enabled:  # each process loads its own shard of the checkpoint
            if policy == best:
                policy_folder.save(self.output / beside, trainer, *common)
            trainer._load_from_checkpoint(str(best), trainer.model_wrapped)
            place = self.output if policy == best else self.output / beside
            policy_folder.save(place, trainer, *common)
        elif trainer.accelerator.is_main_process:
            write = policy_folder.from_checkpoint
            write(self.output / beside, last if policy == best else best, *common)
            if policy == best:
                write(self.output, best, *common)
        return policy


class AtStart(TrainerCallback):
    """Trainer callback that runs once the model is on its devices and sharded, before the first step.

    It hashes the frozen weights into `untouched` and calls `before`.
    """

    def __init__(self, trainer: Any, before: Callable[[], Any] | None):
        self.trainer, self.before, self.untouched = trainer, before, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.untouched = trainable.frozen_hash(self.trainer.model_wrapped)
        if self.before is not None:
            self.before()


def verify(mcq: Path) -> None:
    """Check every question shard against the sha256 in the artifact's manifest.

    Raises StageError, naming the first shard that differs, is missing, or is not in the manifest.
    """
    recorded = {n: f for n, f in manifest.read(mcq).files.items() if n.startswith("mcq-")}
    for name, file in recorded.items():
        path = mcq / name
        if not path.exists() or shards.sha256_file(path) != file.sha256:
            raise StageError(
                f"{path} is not the shard that BuildMCQ froze; delete {mcq} and re-run BuildMCQ"
            )
    if not recorded:
        raise StageError(f"{mcq} holds no question shards; re-run BuildMCQ")
    if strange := sorted({path.name for path in shards.paths(mcq, "mcq")} - set(recorded)):
        raise StageError(f"{mcq / strange[0]} is no shard that BuildMCQ froze; remove it")
