"""Validates while training: the open question about a few val images, decoded greedily.

The reward alone can deceive: a policy rewarded for choosing among options may unlearn to name what an
image shows, while its reward rises. So every `watch_every` steps it answers the open question about
val images of base classes. The checkpoint with the best accuracy is kept beside the last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from trl.data_utils import prepare_multimodal_messages
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from data_cards import Card
from tasks.language import prompts
from tasks.language.answers import parse
from tasks.language.class_names import ClassNames
from tasks.tables import shards
from tasks.tables.pixels import Decoder
from tasks.tables.seeding import row_generator
from training.resources.asked import ANSWERED
from training.shared_prefix.forward import base_of

VLLM_BATCH = 64  # images that vLLM answers at a time; the model answers ANSWERED


@dataclass(frozen=True)
class Sample:
    """A val image: its id, its card's index among the cards, its class id, its encoded bytes."""

    image_id: str
    card: int
    label: int
    image: bytes


def val_sample(
    download: Sequence[Path], split: Sequence[Path], count: int, seed: int
) -> list[Sample]:
    """About `count` val images of base classes, drawn evenly from all sets; the draw depends on `seed`.

    `download` and `split` have one folder a set. A set with fewer val images gives those it has.
    """
    samples: list[Sample] = []
    for number, (images, places) in enumerate(zip(download, split, strict=True)):
        table = shards.read(places, "split").to_pylist()
        rows = [row for row in table if row["split"] == "val" and row["group"] == "base"]
        rows.sort(key=lambda row: row_generator(seed, f"watch/{row['image_id']}").random())
        rows = rows[: -(-count // len(download))]
        encoded = shards.ImageStore(images).read([row["image_id"] for row in rows]) if rows else {}
        samples += [
            Sample(row["image_id"], number, row["label"], encoded[row["image_id"]]) for row in rows
        ]
    return samples


class Watch:
    """Asks the open question about `samples` every `every` steps, and remembers each accuracy.

    An answer has at most `length` tokens. The tokens `ends` and the tokenizer's end token end it.
    `seen` maps a step to its accuracy.
    """

    def __init__(
        self,
        samples: list[Sample],
        cards: Sequence[Card],
        style: str,
        every: int,
        length: int,
        ends: Sequence[int] = (),
    ):
        self.samples, self.every, self.length, self.ends = samples, every, length, ends
        self.names = [ClassNames.of(card) for card in cards]
        self.texts = [prompts.open_question(c.noun, c.kind, style=style) for c in cards]
        self.seen: dict[int, float] = {}

    def due(self, step: int, stop: int) -> bool:
        """Whether to validate after this step; `stop` is the round's last step."""
        return bool(self.samples) and (step % self.every == 0 or step == stop)

    def resume(self, log_history: Sequence[dict[str, Any]], start: int) -> None:
        """Restore the accuracies of this round, which began after step `start`, from a resumed run's log."""
        for row in log_history:
            if row.get("val_accuracy") is not None and row["step"] > start:
                self.seen[row["step"]] = row["val_accuracy"]

    @property
    def best_step(self) -> int | None:
        """The step with the highest accuracy, the latest of equal ones; None before the first."""
        return max(self.seen, key=lambda step: (self.seen[step], step), default=None)

    def look(self, trainer: Any, step: int) -> dict[str, float]:
        """Validate: the shares `val_accuracy` and `val_unreadable`; every process must call it.

        A step that was validated before a resume has its accuracy alone.
        """
        if step in self.seen:
            return {"val_accuracy": self.seen[step]}
        share = self._share(trainer.accelerator.process_index, trainer.accelerator.num_processes)
        counts = torch.zeros(2, device=trainer.accelerator.device)
        samples = [sample for sample, _ in share]
        by_vllm = getattr(trainer, "use_vllm", False)
        texts = self._by_vllm(trainer, samples) if by_vllm else self._by_model(trainer, samples)
        for (sample, counted), text in zip(share, texts, strict=True):
            answer = parse(text).answer
            right = (
                answer is not None
                and self.names[sample.card].match(answer).class_id == sample.label
            )
            if counted:
                counts += counts.new_tensor([float(right), float(answer is None)])
        right, unreadable = trainer.accelerator.gather(counts).view(-1, 2).sum(0).tolist()
        self.seen[step] = right / len(self.samples)
        return {
            "val_accuracy": self.seen[step],
            "val_unreadable": unreadable / len(self.samples),
        }

    def _share(self, process: int, processes: int) -> list[tuple[Sample, bool]]:
        """A process's samples, each with whether it counts.

        Every process gets the same number, so that all generate equally often; the surplus samples do
        not count.
        """
        mine = self.samples[process::processes]
        most = -(-len(self.samples) // processes)
        return [(sample, True) for sample in mine] + [(self.samples[0], False)] * (most - len(mine))

    def _by_vllm(self, trainer: Any, samples: list[Sample]) -> list[str]:
        texts: list[str] = []
        decode = Decoder(trainer.processing_class)
        for start in range(0, len(samples), VLLM_BATCH):
            part = samples[start : start + VLLM_BATCH]
            chats = [
                prepare_multimodal_messages(
                    [{"role": "user", "content": self.texts[sample.card]}],
                    images=[decode(sample.image)],
                )
                for sample in part
            ]
            _, completions, _ = trainer.ask(chats, temperature=0.0, max_tokens=self.length)
            texts += trainer.processing_class.batch_decode(completions, skip_special_tokens=True)
        return texts

    def _by_model(self, trainer: Any, samples: list[Sample]) -> list[str]:
        texts: list[str] = []
        generators = (
            torch.get_rng_state()
        )  # decoding is greedy, but a library may draw random numbers
        with (
            unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
            DistributedBackend(trainer.accelerator).summon_full_params(
                trainer.model_wrapped, recurse=False
            ),
        ):
            # Replaced, since `generate` takes every option that is not passed from the model's own.
            base = base_of(model)
            own, base.generation_config = base.generation_config, self._greedy(trainer)
            training, _ = model.training, model.eval()
            for start in range(0, len(samples), ANSWERED):
                texts += self._answers(trainer, model, samples[start : start + ANSWERED])
            model.train(training)
            base.generation_config = own
        torch.set_rng_state(generators)
        return texts

    def _greedy(self, trainer: Any) -> GenerationConfig:
        tokenizer = trainer.processing_class.tokenizer
        return GenerationConfig(
            max_new_tokens=self.length,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=sorted({*self.ends, tokenizer.eos_token_id}),
            pad_token_id=tokenizer.pad_token_id,
        )

    def _answers(self, trainer: Any, model: Any, part: list[Sample]) -> list[str]:
        processor = trainer.processing_class
        texts = [
            prompts.rendered(processor, prompts.chat(self.texts[sample.card])) for sample in part
        ]
        decode = Decoder(processor)
        images = [[decode(sample.image)] for sample in part]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        shared = getattr(trainer, "shared_prompts", None)
        made = shared and shared.generate(dict(inputs), range(len(part)))
        with torch.no_grad():
            output = made.sequences if made else model.generate(**inputs)
        ends = output[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(ends, skip_special_tokens=True)
