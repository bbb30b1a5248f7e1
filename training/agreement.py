"""Whether vLLM inside the trainer generates what the trainer's own model would.

Two things can make them differ without a word: image tokens expanded twice on the way, and base
weights that drift when adapters are merged in and out of them at every hand-over. The first is
looked at before the first step, the second is undone at every hand-over. A third, image embeddings
cached by vLLM for other weights, is prevented by clearing that cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from trl.data_utils import prepare_multimodal_messages

from tasks.run import StageError
from training.parts import BaseKeeper

NEEDED = 0.5  # share of leading tokens alike; rounding parts greedy answers late, a fault at once


def check_vllm(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Greedy completions of some training prompts by both; returns the share of tokens alike.

    Also has base weights restored and vLLM's image embeddings forgotten after every hand-over.
    Raises StageError when the two part from the beginning.
    """
    guard_sync(trainer)
    asked = [prepare_multimodal_messages(r["prompt"], images=[r["image"]]) for r in rows]
    prompt_ids, images, fields = trainer._tokenize_prompts(asked)
    kept = trainer.vllm_generation.temperature
    trainer.vllm_generation.temperature = 0.0
    try:
        theirs, _ = trainer._generate_single_turn(prompt_ids, images, fields, 1)
    finally:
        trainer.vllm_generation.temperature = kept
    # With vLLM the trainer has no configuration for generating by itself.
    trainer.use_vllm, trainer.generation_config = False, greedy(trainer)
    trainer.generation_kwargs = {"max_new_tokens": trainer.max_completion_length}
    try:
        ours, _ = trainer._generate_single_turn(prompt_ids, images, fields, 1)
    finally:
        trainer.use_vllm = True
        del trainer.generation_config, trainer.generation_kwargs
    share = alike(ours, theirs)
    if trainer.accelerator.is_main_process:
        print(f"train: vLLM and the trainer's model agree on {share:.0%} of greedy tokens")
    if share < NEEDED:
        raise StageError(
            f"vLLM and the trainer's model agree on only {share:.0%} of the tokens of greedy answers "
            'to training questions; train without it ("use_vllm": false in [Train] trl)'
        )
    return share


def alike(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Mean share of each completion up to which both say the same."""
    shares = []
    for one, other in zip(ours, theirs, strict=True):
        longest = max(len(one), len(other))
        same = next(
            (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
            min(len(one), len(other)),
        )
        shares.append(same / longest if longest else 1.0)
    return sum(shares) / len(shares)


def greedy(trainer: Any) -> Any:
    """A generation config like TRL's for sampling, without the sampling."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=trainer.max_completion_length,
        do_sample=False,
        pad_token_id=trainer._tokenizer.pad_token_id,
        eos_token_id=trainer.eos_token_ids,
    )


def guard_sync(trainer: Any) -> None:
    """After every hand-over of weights: undo drift of the base, forget cached image embeddings."""
    engine = trainer.vllm_generation
    model = trainer.accelerator.unwrap_model(trainer.model)
    keeper = BaseKeeper(model) if hasattr(model, "peft_config") else None
    sync, forget = engine.sync_weights, _forgetting(engine)
    if keeper is not None:
        trainer.base_keeper = keeper

    @torch.no_grad()
    def sync_weights() -> None:
        sync()
        if keeper is not None:
            trainer._metrics["train"]["base_drift"].append(keeper.restore())
        forget()

    engine.sync_weights = sync_weights


def _forgetting(engine: Any) -> Callable[[], Any]:
    """What makes vLLM forget image embeddings of older weights.

    A server has no such call: told once, for a trained vision tower it would go on with stale ones.
    """
    llm = getattr(engine, "llm", None)
    if llm is not None:
        return llm.llm_engine.reset_encoder_cache
    print(
        "train: a vLLM server keeps image embeddings of older weights; train only the language model "
        "with it ([Train] freeze = vision projector, or lora_targets = language)"
    )
    return lambda: None
