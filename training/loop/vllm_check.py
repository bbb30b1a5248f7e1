"""Whether vLLM inside the trainer generates what the trainer's own model would.

Before the first step vLLM answers some training questions and tells the log-probabilities of its
tokens; the trainer's model scores the same tokens, with the pictures. Rounding in bfloat16 makes
single tokens differ, to either side. A fault is larger and has a side: of tokens drawn from vLLM's
distribution, the mean of (vLLM's - the trainer's) is the divergence of the trainer's from it.

Two further faults are undone at every hand-over of weights: base weights that drift when adapters
are merged in and out of them, and image embeddings that vLLM keeps from older weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from tasks.runtime.errors import StageError
from training.model.trainable import BaseKeeper
from training.shared_prefix.groups import IMAGE_INPUTS

TOKENS = 64  # of an answer that is compared
# Bounds on the mean of |vLLM's - the trainer's| log-probability of a token, and on the mean of it.
# Healthy in bfloat16: 0.001 and 0.001 of a trained miniature, up to 0.05 and 0.002 of random nets of 36
# layers. Faults of the miniature: 0.22 and 0.18 with image tokens expanded twice, 1.2 and 1.2 without
# pictures, 0.14 and 0.13 with weights off by 0.3 of their spread.
APART, ASIDE = 0.15, 0.03


def check_vllm(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """The mean difference of a token's log-probability between vLLM and the trainer's model, in nats.

    Of vLLM's answers to some training questions, drawn at the training's temperature and shaped by
    nothing else. Also has base weights restored and vLLM's image embeddings forgotten after every
    hand-over. Every process must call it with as many rows, and all decide alike. Raises StageError
    when the difference is more than rounding, or when vLLM sees other prompts.
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
    """What all processes have found, judged by each of them from the same numbers."""
    sums = [len(difference), difference.abs().sum(), difference.sum(), fault is not None]
    mine = torch.tensor([float(x) for x in sums], device=trainer.accelerator.device)
    count, apart, aside, faults = trainer.accelerator.gather(mine).view(-1, 4).sum(0).tolist()
    if faults:
        raise fault or StageError("another process found vLLM to see other prompts; see above")
    apart, aside = apart / max(count, 1), aside / max(count, 1)
    told = f"{apart:.4f} apart in the mean, {aside:+.4f} to one side"
    if trainer.accelerator.is_main_process:
        print(
            f"train: vLLM and the trainer's model: log-probabilities of {count:.0f} tokens {told}",
            flush=True,
        )
    if not count or not (apart <= APART and abs(aside) <= ASIDE):  # not a number is a fault, too
        raise StageError(
            f"vLLM's log-probabilities of its answers and the trainer's are {told} (at most {APART} "
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
    told: list[list[float | None]],
) -> torch.Tensor:
    """(tokens): vLLM's log-probability of each token less the trainer's; one pass a question."""
    model, found = trainer.model, []
    training, _ = model.training, model.eval()
    for chat, prompt, completion, theirs in zip(chats, prompts, completions, told, strict=True):
        ours = _scored(trainer, chat, prompt, completion).float().cpu()
        known = torch.tensor([float("nan") if x is None else x for x in theirs])
        found.append((known - ours)[~known.isnan()])
    model.train(training)
    return torch.cat(found)


def _scored(trainer: Any, chat: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """(completion tokens): log-probabilities by TRL's own pass, with the picture."""
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
    """After every hand-over of weights: undo drift of the base, forget cached image embeddings."""
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
    """What makes vLLM forget image embeddings of older weights.

    A server is asked to at once, so that one that cannot is known before the first step.
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
