"""Which settings of [Train] go together in a round of GRPO, told before any stage and again in Train."""

from tasks.runtime.errors import StageError
from training.settings import TrainSettings

# Rewards with a factor that is the same for all completions of a question.
WEIGHTED = ("difficulty_weighted", "contrast")


def check_questions(settings: TrainSettings, *, ask: str, pairs: bool, prompt_style: str) -> None:
    """Raise StageError where the settings do not go with the round's questions.

    `ask` is mcq or open, as in `training.settings.Round`; `pairs` says whether each question is asked
    with its partner.
    """
    rewards, trl = settings.rewards, settings.trl
    weighted = next((name for name in WEIGHTED if name in rewards), "")
    apart = trl.get("multi_objective_aggregation") == "normalize_then_sum"
    problem = ""
    if "contrast" in rewards and not pairs:
        problem = "rewards: contrast is for the pairs of the method contrast; leave it out"
    elif "frequency" in rewards and ask == "mcq":
        problem = (
            "rewards: frequency counts the names of open answers, and this round asks "
            "multiple-choice questions; leave it out"
        )
    elif "think_length" in rewards and prompt_style == "direct":
        problem = (
            "rewards: think_length pays for the length of a thought, and the prompt style direct asks "
            "for none; leave it out"
        )
    elif settings.order == "curriculum" and ask == "open":
        problem = (
            "order = curriculum goes by candidates, and this round asks open questions, which have none; "
            "set it to shuffled"
        )
    elif weighted and (apart or trl.get("scale_rewards", "group") in ("group", True)):
        way = "multi_objective_aggregation" if apart else "scale_rewards"
        instead = "leave it out" if apart else 'set "scale_rewards" to "batch" or "none"'
        value = "normalize_then_sum" if apart else "group"
        problem = (
            f'trl: "{way}": "{value}" divides away what {weighted} pays a whole group; {instead}'
        )
    elif pairs and settings.dynamic_sampling:
        problem = "dynamic_sampling would replace one question of a pair; set it to 0"
    elif pairs and settings.questions_per_step < 2:
        problem = "questions_per_step must be at least 2, for both questions of a pair"
    elif settings.quantized and trl.get("use_vllm"):
        problem = (
            'quantize does not go with vLLM in the trainer; set "use_vllm": false in trl, or '
            "quantize = none"
        )
    if problem:
        raise StageError(f"[Train] {problem}")


def check_batches(settings: TrainSettings, processes: int, pairs: bool = False) -> None:
    """Raise StageError where a step's completions cannot be divided, or checkpoints fall inside their uses.

    `processes` is how many train. A run that is resumed in the middle of the uses of one generation
    batch would train on other completions. The questions of a pair must stand in one step.
    """
    batch = settings.questions_per_step * settings.num_generations
    micro, size = settings.micro_batch_size, settings.micro_batch_size * processes
    check_division(batch, micro, processes)
    accumulation = batch // size  # micro-batches a step
    generated = settings.trl.get("generation_batch_size")
    turns = settings.trl.get("steps_per_generation")
    if generated and turns:
        raise StageError(
            "[Train] trl: generation_batch_size and steps_per_generation say the same; leave one out"
        )
    here = f"[Train] trl: generation_batch_size = {generated}"
    least = batch if generated else accumulation
    if turns:
        here = f"[Train] trl: steps_per_generation = {turns}"
    completions = generated or (turns or accumulation) * size  # of a generation batch
    if completions % size or completions % settings.num_generations:
        raise StageError(
            f"{here} makes {completions} completions at a time, which must be whole micro-batches of {size} "
            f"and whole groups of {settings.num_generations}; set it to {least}, or leave it out"
        )
    turns = completions // size
    if settings.dynamic_sampling and micro * turns % settings.num_generations:
        raise StageError(
            f"[Train] dynamic_sampling needs whole groups on every process: micro_batch_size x "
            f"steps_per_generation = {micro * turns} completions are no multiple of num_generations = "
            f"{settings.num_generations}"
        )
    if turns < accumulation:
        raise StageError(
            f"{here} would generate several times a step; set it to {least} or more, or leave it out"
        )
    if pairs and turns != accumulation:
        raise StageError(
            f"{here} would put the questions of a pair into different steps; set it to {least}, or leave "
            "it out"
        )
    uses = turns * settings.trl.get("num_iterations", 1)
    every = uses // accumulation if uses % accumulation == 0 else uses
    for name in ("save_steps", "steps", "watch_every"):
        steps = getattr(settings, name)
        if steps * accumulation % uses:
            raise StageError(
                f"[Train] {name} = {steps} ends between the {uses} uses of one batch of "
                f"completions, where training cannot go on exactly; set it to a multiple of {every}"
            )


def check_division(batch: int, micro: int, processes: int) -> None:
    """Raise StageError unless a step's batch is a multiple of micro_batch_size x processes.

    It names the largest size up to `micro` that divides the batch.
    """
    if batch % (micro * processes) == 0:
        return
    each, left = divmod(batch, processes)
    if left:
        mend = f"set questions_per_step to a multiple of {processes}"
    else:
        mend = f"set it to {next(n for n in range(min(micro, each), 0, -1) if each % n == 0)}"
    raise StageError(
        f"[Train] micro_batch_size: a step's batch of {batch} (questions_per_step x num_generations "
        f"completions, or examples) must be a multiple of micro_batch_size x processes = {micro} x "
        f"{processes}; {mend}"
    )
