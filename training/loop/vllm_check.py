"""Checks that vLLM inside the trainer has the same weights, prompts and images as the trainer.

Before the first step vLLM answers some training questions and returns the log-probability of each
token. The trainer's model scores the same tokens with the same images. Rounding in bfloat16 makes
single tokens differ, in both directions. A fault makes larger differences, in one direction: over
tokens drawn from vLLM's distribution, the mean of (vLLM's - the trainer's) log-probability is the KL
divergence between the two, which is never negative.

`guard_sync` also undoes two faults of every weight transfer to vLLM. Merging adapters into the base
weights and back makes these drift, and vLLM caches image embeddings of older weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from trl.data_utils import prepare_multimodal_messages

from tasks.runtime.errors import StageError
from training.model.grpo_trainer import GRPOTrainer
from training.model.trainable import BaseKeeper
from training.shared_prefix.groups import IMAGE_INPUTS

TOKENS = 64  # the most tokens of an answer
# Bounds on the mean absolute and the mean signed difference of a token's log-probability, vLLM's less
# the trainer's, in nats. Measured without a fault in bfloat16: 0.001 and 0.001 (the trained tiny policy),
# up to 0.05 and 0.002 (random models of 36 layers). Measured with faults of the tiny policy: 0.22 and
# 0.18 (image tokens expanded twice), 1.2 and 1.2 (no image), 0.14 and 0.13 (weights with noise of 0.3
# of their standard deviation).
APART, ASIDE = 0.15, 0.03


def check_vllm(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """The mean absolute difference of a token's log-probability, vLLM against the trainer, in nats.

    vLLM answers the training questions `rows`, at the training's temperature and with no other
    sampling option. Also installs `guard_sync`. Every process must call it with equally many rows, and
    all raise or return alike. Raises StageError when the difference is more than rounding, or when
    vLLM sees other prompts.
    """
    guard_sync(trainer)
    chats = [prepare_multimodal_messages(row["prompt"], images=[row["image"]]) for row in rows]
    limit = min(TOKENS, trainer.max_completion_length)
    fault: StageError | None = None
    difference = torch.zeros(0)
    try:
        asked = trainer.ask(chats, temperature=trainer.temperature, max_tokens=limit)
    except StageError as error:
        fault = error
    else:
        difference = _difference(trainer, chats, *asked)
    return _judged(trainer, difference, fault)


def _judged(trainer: Any, difference: torch.Tensor, fault: StageError | None) -> float:
    """Average over all processes and apply the bounds, so that every process decides alike."""
    sums = [len(difference), difference.abs().sum(), difference.sum(), fault is not None]
    mine = torch.tensor([float(x) for x in sums], device=trainer.accelerator.device)
    count, apart, aside, faults = trainer.accelerator.gather(mine).view(-1, 4).sum(0).tolist()
    if faults:
        raise fault or StageError("another process found vLLM to see other prompts; see above")
    apart, aside = apart / max(count, 1), aside / max(count, 1)
    figures = f"{apart:.4f} apart in the mean, {aside:+.4f} to one side"
    if trainer.accelerator.is_main_process:
        print(
            f"train: vLLM and the trainer's model: log-probabilities of {count:.0f} tokens {figures}",
            flush=True,
        )
    if not count or not (apart <= APART and abs(aside) <= ASIDE):  # NaN is a fault, too
        raise StageError(
            f"vLLM's log-probabilities of its answers and the trainer's are {figures} (at most {APART} "
            f"and {ASIDE}), so that it generates with other weights, prompts or pictures; train "
            'without it ("use_vllm": false in [Train] trl)'
        )
    return apart


@torch.no_grad()
def _difference(
    trainer: Any,
    chats: list[Any],
    prompts: list[list[int]],
    completions: list[list[int]],
    logps: list[list[float | None]],
) -> torch.Tensor:
    """(tokens,): vLLM's log-probability of each token less the trainer's, by one pass a question."""
    model, differences = trainer.model, []
    training, _ = model.training, model.eval()
    for chat, prompt, completion, theirs in zip(chats, prompts, completions, logps, strict=True):
        ours = _scored(trainer, chat, prompt, completion).float().cpu()
        known = torch.tensor([float("nan") if x is None else x for x in theirs])
        differences.append((known - ours)[~known.isnan()])
    model.train(training)
    return torch.cat(differences)


def _scored(trainer: Any, chat: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """(completion tokens,): log-probabilities by TRL's own forward pass, with the image."""
    device = trainer.accelerator.device
    images = [part["image"] for m in chat for part in m["content"] if part["type"] == "image"]
    fields = trainer.processing_class(
        text=[trainer.chat_text(chat)], images=[images], return_tensors="pt"
    )
    inputs = {name: fields[name].to(device) for name in IMAGE_INPUTS if name in fields}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            after = inputs[name].new_zeros(1, len(completion))
            inputs[name] = torch.cat([inputs[name], after], 1)
    pixels = inputs.get("pixel_values")
    if pixels is not None and "image_grid_thw" not in inputs and len(pixels) != len(images):
        inputs["num_tiles"] = [len(pixels)]
    ids = torch.tensor([prompt + completion], device=device)
    logps, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer,
        trainer.model,
        ids,
        torch.ones_like(ids),
        len(completion),
        num_images=[len(images)],
        **inputs,
    )
    return logps[0]


def guard_sync(trainer: Any) -> None:
    """Make every weight transfer to vLLM restore the base weights and drop cached image embeddings."""
    engine = trainer.vllm_generation
    model = trainer.accelerator.unwrap_model(trainer.model)
    keeper = BaseKeeper(model) if hasattr(model, "peft_config") else None
    sync, forget = engine.sync_weights, forgetting(engine)
    if keeper is not None:
        trainer.base_keeper = keeper

    @torch.no_grad()
    def sync_weights() -> None:
        sync()
        if keeper is not None:
            trainer._metrics["train"]["base_drift"].append(keeper.restore())
        forget()

    engine.sync_weights = sync_weights


def forgetting(engine: Any) -> Callable[[], Any]:
    """The function that makes vLLM drop the image embeddings of older weights.

    A server is asked once right away, so that one that cannot do it stops the run before its first
    step. Raises StageError then.
    """
    if engine.mode == "colocate":
        return engine.llm.llm_engine.reset_encoder_cache

    def forget() -> None:
        if not engine.accelerator.is_main_process:
            return
        client = engine.vllm_client
        answer = client.session.post(f"{client.base_url}/reset_encoder_cache")
        if answer.status_code != 200:
            raise StageError(
                f"the vLLM server at {client.base_url} keeps image embeddings of older weights (it "
                f"answers {answer.status_code} to /reset_encoder_cache): start it with "
                "VLLM_SERVER_DEV_MODE=1, or train the language model alone ([Train] freeze = vision "
                "projector, or lora_targets = language)"
            )

    forget()
    return forget
