"""What a training needs is told in numbers before it starts, and fits the machine that a recipe names."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest

from pipeline.cli import fits, plan
from tasks.runtime.errors import StageError
from tests.conftest import ROOT, recipe_files, settings_of
from tests.pipeline.cli.test_plan import config, recipe  # noqa: F401  fixtures
from training.model import processors
from training.model.tiny_policy import new_model, processor, save
from training.resources import disk, gpu_memory, main_memory, needs, vllm_memory
from training.resources.sizes import sizes_of
from training.settings import TrainSettings

GB, GIB = 1e9, 1 << 30
SMALL, LARGE = "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.cfg"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GIVEN = {
    "dtype": "bfloat16", "freeze": "none", "lora_rank": 0, "lora_targets": "language",
    "quantize": "none", "questions_per_step": 8, "num_generations": 8, "micro_batch_size": 8,
    "max_completion_length": 512, "shared_prefix": True, "tokens_per_micro_batch": 0, "steps": 200,
    "save_steps": 20, "watch_every": 20, "keep_checkpoints": 2, "carry_over": True,
}  # fmt: skip


def asked(model=SMALL, place=None, options=None, supervised=False, **given) -> needs.Asked:
    read = needs.Options.of({"gradient_checkpointing": True, **(options or {})})
    place = place or needs.Place()
    settings = settings_of(TrainSettings, **{**GIVEN, **given})
    return needs.Asked(model, (700, 512), settings, read, place, supervised)


def test_the_sizes_of_a_known_shape_are_those_of_its_card():
    found = sizes_of(LARGE)
    assert found.count == pytest.approx(8.29e9, rel=0.001)
    # Keys and values of four heads of 128 numbers in 28 layers.
    assert found.cache == 2 * 4 * 128 * 28
    assert (found.merged, found.tied, sizes_of(SMALL).tied) == (4, False, True)
    assert sizes_of("google/gemma-3-4b-it").merged == 16


def test_a_colocated_vllm_needs_its_weights_itself_and_a_cache_for_one_sequence():
    found = vllm_memory.vllm_needs(SMALL, max_length=1200, sequences=64)
    count = sizes_of(SMALL).count
    assert found.weights == 2 * count
    assert found.one == 1200 * 2 * 2 * 128 * 36 * 2
    assert found.least == found.weights + GIB + found.one
    assert found.all == 64 * found.one
    half = vllm_memory.vllm_needs(SMALL, max_length=1200, sequences=64, tensor_parallel=2)
    assert (half.weights, half.one) == (found.weights / 2, found.one / 2)
    # Prompts of 700 tokens fill 43 blocks of 16, which eight completions share.
    grouped = vllm_memory.vllm_needs(
        SMALL, max_length=1200, sequences=64, prompts=8, prompt_tokens=700
    )
    assert (grouped.one, grouped.least) == (found.one, found.least)
    assert grouped.all == found.all - 56 * 688 * found.one / 1200
    whole = vllm_memory.vllm_needs(LARGE, max_length=128_000, sequences=1)
    assert whole.one / GIB == pytest.approx(6.8, abs=0.05), "what vLLM asks for without a bound"


def test_a_share_too_small_for_vllm_is_refused_with_the_one_that_would_do(capsys):
    found = vllm_memory.vllm_needs(SMALL, max_length=1216, sequences=64)
    with pytest.raises(StageError, match=r"utilization of 0\.36 or more") as refused:
        vllm_memory.check_vllm(found, 0.3, 24 * GB)
    assert "gives it 6.71" in str(refused.value)
    assert vllm_memory.check_vllm(found, 0.36, 24 * GB) == 0.36 * 24 * GB
    assert re.search(r"cache holds \d sequences at once; the others wait", capsys.readouterr().out)
    vllm_memory.check_vllm(found, found.share(24 * GB, all_at_once=True), 24 * GB)
    assert "others wait" not in capsys.readouterr().out
    with pytest.raises(StageError, match="a smaller model"):
        vllm_memory.check_vllm(found, 0.9, 8 * GB)


def test_training_must_fit_beside_vllm_unless_that_sleeps():
    needed = gpu_memory.of_gpu(asked())
    room = needed.certain + 20 * GB
    gpu_memory.check(needed, room, 19 * GB)
    with pytest.raises(StageError, match="vllm_enable_sleep_mode"):
        gpu_memory.check(needed, room, 21 * GB)
    gpu_memory.check(needed, room, 21 * GB, vllm_sleeps=True)
    with pytest.raises(StageError, match="GiB beside vLLM's"):
        gpu_memory.check(needed, room, needed.gradients + needed.copies + 21 * GB, vllm_sleeps=True)


def test_a_colocated_vllm_holds_the_prompt_of_a_group_once(capsys):
    found = needs.of_vllm(asked(options={"use_vllm": True}))
    alone = needs.of_vllm(
        asked(options={"use_vllm": True}, num_generations=2, questions_per_step=32)
    )
    assert (found.least, found.sequences) == (alone.least, alone.sequences) == (alone.least, 64)
    assert found.all < alone.all
    # With the room for which all of these wait or not, more of a group's sequences are there at once.
    at_once = []
    for needed in (found, alone):
        vllm_memory.check_vllm(needed, 1.0, needed.least + found.all / 2)
        at_once += map(int, re.findall(r"cache holds (\d+) sequences", capsys.readouterr().out))
    assert at_once[1] < at_once[0] < 64


def test_checkpoints_are_counted_by_what_is_written():
    count = sizes_of(LARGE).count
    whole = disk.of_disk(asked(LARGE))
    assert whole.checkpoint == 12 * count
    assert whole.checkpoint / GB == pytest.approx(99.5, abs=0.1)
    # Two kept, the next one, and the best by val images.
    assert whole.kept == 4
    assert whole.peak == 4 * 12 * count + 2 * 2 * count
    assert whole.left == 12 * count + 2 * 2 * count
    full, parts = (needs.Place(8, sharding="fsdp", full=f) for f in (True, False))
    assert disk.of_disk(asked(LARGE, full)).checkpoint / GB == pytest.approx(132.7, abs=0.1)
    assert disk.of_disk(asked(LARGE, parts)).checkpoint == whole.checkpoint
    assert disk.of_disk(asked(LARGE, save_steps=200, watch_every=0)).kept == 1
    assert not disk.of_disk(asked(LARGE, carry_over=False)).carried
    adapters = disk.of_disk(asked(LARGE, lora_rank=32))
    assert adapters.checkpoint == 12 * sizes_of(LARGE).trained((), 32, ("language",))
    assert adapters.peak < 10 * GB


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path, capsys):
    needed = disk.of_disk(asked(LARGE))
    disk.check(needed, tmp_path, needed.peak)
    disk.check(needed, tmp_path / "not" / "yet", float("inf"))
    adapters = disk.of_disk(asked(lora_rank=1, steps=1))
    disk.check(adapters, tmp_path / "not" / "yet")
    assert "4 checkpoints of 99.5" in capsys.readouterr().out
    with pytest.raises(StageError, match=r"keep_checkpoints, LoRA .*, or \[run\] artifacts"):
        disk.check(needed, tmp_path, needed.peak - 1)


def test_main_memory_counts_processes_states_and_what_one_of_them_gathers():
    count = sizes_of(LARGE).count
    sharded = needs.Place(8, sharding="fsdp", full=True)
    found = main_memory.of_main_memory(asked(LARGE, sharded, {"use_vllm": True}))
    assert (found.loading, found.saving) == (4 * count, 8 * count)
    zero = needs.Place(8, sharding="deepspeed", offloaded=True)
    found = main_memory.of_main_memory(asked(LARGE, zero))
    assert found.states == 24 * count
    assert gpu_memory.of_gpu(asked(LARGE, zero)).optimizer == 0
    alone = main_memory.of_main_memory(asked(SMALL, None, {"use_vllm": True}, lora_rank=8))
    assert alone.base == 2 * sizes_of(SMALL).adapted["language"]
    with pytest.raises(StageError, match="fewer processes a machine"):
        main_memory.check_main(alone, alone.total - 1)
    main_memory.check_main(alone, alone.total)


def test_what_trl_is_not_told_is_what_trl_takes():
    from trl import GRPOConfig

    theirs = GRPOConfig.__dataclass_fields__
    for field in dataclasses.fields(needs.Options):
        # None: as many as micro-batches make a step. Recomputing is off in ours (training.loop.trl_settings).
        if field.name not in ("steps_per_generation", "gradient_checkpointing"):
            assert field.default == theirs[field.name].default, field.name
    told = needs.Options.of({"optim": "adamw_8bit", "use_vllm": True, "unknown": 1})
    assert (told.optim, told.use_vllm, told.beta) == ("adamw_8bit", True, 0.0)


def test_a_launcher_says_how_many_processes_share_what():
    recipes = "training/recipes"
    line = f"accelerate launch --config_file {recipes}/fsdp2.yaml --num_processes 6"
    found = needs.Place.of_launcher(line, ROOT)
    assert (found.processes, found.shards, found.sharding) == (6, 6, "fsdp")
    found = needs.Place.of_launcher(f"accelerate launch --config_file={recipes}/zero3.yaml", ROOT)
    assert (found.sharding, found.offloaded, found.local) == ("deepspeed", True, 8)
    nodes = f"accelerate launch --config_file {recipes}/many_nodes.yaml --machine_rank 1"
    found = needs.Place.of_launcher(nodes, ROOT)
    assert (found.processes, found.machines, found.local) == (16, 2, 8)
    found = needs.Place.of_launcher("torchrun --nproc_per_node 2", ROOT)
    assert (found.processes, found.shards) == (2, 1)
    assert needs.Place.of_launcher("") == needs.Place()


def test_the_check_before_training_asks_for_memory_and_disk(tmp_path, monkeypatch, capsys):
    from PIL import Image
    from trl import GRPOConfig

    save(new_model(0), processor(), tmp_path / "policy")
    trl = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, num_generations=2,
                     per_device_train_batch_size=4)  # fmt: skip
    row = {"prompt": [{"role": "user", "content": "What?"}], "image": Image.new("RGB", (84, 84))}
    changed = {**GIVEN, "dtype": "float32", "num_generations": 2, "micro_batch_size": 4}
    settings = settings_of(TrainSettings, **changed)
    ready = processors.load_processor(tmp_path / "policy")
    needs.check(tmp_path / "policy", ready, row, trl, settings, tmp_path)
    told = capsys.readouterr().out
    assert re.search(r"train: about [\d.]+ GiB \(weights .*, process 1\.00\) of", told)
    assert "train: on disk" in told
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StageError, match="training writes up to"):
        needs.check(tmp_path / "policy", ready, row, trl, settings, tmp_path)


# Recipes and examples.


def fitting(dataset: str = "cub") -> dict:
    """A plan, in which every stage fits."""
    found = plan.plan(dataset, "dive_k", 0, plan.Estimates())
    assert found["machine"], "a recipe names its machine: # machine: 8 x 80 GB"
    for one in found["fits"]:
        assert one["fits"], f"{one['stage']}: {one['told']}"
    assert {one["stage"] for one in found["fits"]} == {"Propose", "Train", "Evaluate"}
    assert found["warnings"] == []
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_machine_that_it_names(recipe, monkeypatch, path):
    recipe(*(file.name for file in recipe_files(path)))
    monkeypatch.chdir(ROOT)  # where launchers' files are looked for
    found = fitting()
    place = needs.Place.of_launcher(read_launcher(path), ROOT)
    assert found["machine"]["gpus"] == place.processes
    assert found["machine"]["main"]
    assert found["disk"]["gb"]["Train"] < 1000
    assert found["memory"]["gib"]["total"] > 5


def read_launcher(path) -> str:
    lines = [line for file in recipe_files(path) for line in file.read_text().splitlines()]
    return next((s.partition("= ")[2] for s in lines if s.startswith("launcher = ")), "")


def examples() -> list[str]:
    """The ini blocks of the pages that name a machine."""
    blocks = [b for p in PAGES for b in re.findall(r"```ini\n(.*?)```", p.read_text(), re.DOTALL)]
    return [block for block in blocks if fits.NAMED.search(block)]


def test_the_pages_have_an_example_for_a_gpu_and_it_fits_the_machine_that_it_names(
    recipe, monkeypatch
):  # fmt: skip
    found = examples()
    assert found, "a block ```ini with a line # machine: 1 x 80 GB"
    monkeypatch.chdir(ROOT)
    for block in found:
        recipe(block)
        fitting()


def test_what_a_recipe_asks_for_does_not_fit_a_smaller_machine(recipe, monkeypatch):
    recipe("one_gpu_lora.cfg")
    monkeypatch.chdir(ROOT)
    found = plan.plan("cub", "dive_k", 0, plan.Estimates(gpu_gb=16))
    train = next(one for one in found["fits"] if one["stage"] == "Train")
    assert train["fits"] is False
    assert "vllm_gpu_memory_utilization" in train["reason"]
    recipe("eight_gpus_fsdp2.cfg")
    found = plan.plan("cub", "dive_k", 0, plan.Estimates(gpus=4))
    told = json.dumps(found["fits"])
    assert "starts 8 processes and there are 4 GPUs" in told
