"""A stand-in for vLLM below TRL's own interface: a second copy of the model, fed as vLLM is fed.

It expands the image token of a prompt by itself, as vLLM does also where that was done already,
takes up weights by name, draws token by token and tells processed log-probabilities. TRL's and the
project's code above it is the real one.

torchrun --nproc_per_node=2 -m tests.stub_vllm POLICY OUTPUT   # one process' vLLM sees no pictures
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from tests import prefix_models
from training.model.rollout_engine import RolloutEngine


class StubLLM:
    """`blind`: pictures are replaced by grey; `noise`: spread of an error in what is told."""

    def __init__(self, model: Any, processor: Any):
        # From its folder, as vLLM does: a copy of TRL's model would forward the original.
        own = AutoModelForImageTextToText.from_pretrained(model.name_or_path, dtype=torch.float32)
        self.model = own.eval()
        self.processor = processor
        self.blind, self.noise = False, 0.0
        self.calls, self.loaded, self.forgotten = 0, 0, 0
        self.sampling: list[Any] = []
        self.draws = torch.Generator().manual_seed(0)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        executor = SimpleNamespace(driver_worker=worker)
        self.llm_engine = SimpleNamespace(
            model_executor=executor, reset_encoder_cache=self.reset_encoder_cache
        )

    def load_weights(self, weights: Any) -> None:
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in weights:
                own[name].copy_(weight)
        self.loaded += 1

    def reset_encoder_cache(self) -> None:
        self.forgotten += 1

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: Any, sampling_params: Any, use_tqdm: bool) -> list[Any]:
        self.calls += 1
        torch.rand(1)  # an engine in this process draws from its generators
        self.sampling.append(sampling_params)
        return [self._answer(prompt, sampling_params) for prompt in prompts]

    @torch.no_grad()
    def _answer(self, prompt: Any, given: Any) -> Any:
        image = prompt["multi_modal_data"]["image"]
        if self.blind:
            image = image.point(lambda _: 128)
        seen = self.processor.image_processor(images=[image], return_tensors="pt")
        count = int(seen["image_grid_thw"].prod()) // 4
        image_token = self.model.config.image_token_id
        ids = list(prompt["prompt_token_ids"])
        place = ids.index(image_token)
        expanded = ids[:place] + [image_token] * count + ids[place + 1 :]
        shown = expanded if expanded.count(image_token) == count else ids
        tokens, told = [], []
        for _ in range(given.max_tokens):
            row = torch.tensor([shown + tokens])
            types = (row == image_token).int()
            logits = self.model(input_ids=row, mm_token_type_ids=types, **seen).logits[0, -1]
            for token, bias in (given.logit_bias or {}).items():
                logits[token] += bias
            logps = (logits / (given.temperature or 1.0)).log_softmax(-1)
            drawn = torch.multinomial(logps.exp(), 1, generator=self.draws)
            token = int(drawn if given.temperature else logps.argmax())
            error = self.noise * torch.randn((), generator=self.draws) if self.noise else 0.0
            tokens.append(token)
            told.append({token: SimpleNamespace(logprob=float(logps[token] + error), rank=1)})
            if token == self.processor.tokenizer.eos_token_id:
                break
        output = SimpleNamespace(token_ids=tokens, logprobs=told)
        return SimpleNamespace(prompt_token_ids=expanded, outputs=[output])


def start(engine: RolloutEngine) -> None:
    """In the place of RolloutEngine._init_vllm."""
    engine.llm = StubLLM(engine.model, engine.processing_class)


def main() -> None:
    from tasks.runtime.errors import StageError
    from training.loop import vllm_check

    RolloutEngine._init_vllm = start  # type: ignore[method-assign]
    one = prefix_models.trainer(
        Path(sys.argv[1]), Path(sys.argv[2]), use_vllm=True, per_device_train_batch_size=8
    )
    rows, found = prefix_models.questions(4), [""]
    found[0] = f"{vllm_check.check_vllm(one, rows):.6f}"
    one.vllm_generation.llm.blind = one.accelerator.process_index == 1
    try:
        vllm_check.check_vllm(one, rows)
    except StageError as error:
        found.append(str(error))
    Path(sys.argv[2], f"{one.accelerator.process_index}.txt").write_text("\n".join(found))
    one.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
