"""Other families than the default's go through the whole line: nothing knows their names.

Their images are of several shapes, as photographs are, from 32 x 32 pixels to 12 megapixels: a family
that cuts images into tiles makes different numbers of them in one batch.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

import data_cards
from tasks.tables import shards
from tasks.tables.split_table import select
from tests.conftest import ENGINE, ROOT, evaluate_arguments, propose_arguments
from tests.photographs import THUMBNAIL, TWELVE_MP, photograph, replaced
from tests.training.test_grpo import arguments, cards_of, freeze
from training.model.trainable import PARTS

pytestmark = pytest.mark.model
SHAPES = ((84, 84), (84, 42), (40, 84))  # width and height in pixels
ALL = set(PARTS)
# Gemma-3's projector is a bare matrix, not a linear layer, and so has no adapter.
ADAPTED = {
    "gemma3": ALL - {"projector"},
    "qwen3_vl": ALL,
    "idefics3": ALL,
    "idefics3_untiled": ALL,
    "smolvlm": ALL,
    "llava_onevision": ALL,
    "internvl": ALL,
    "real_vocabulary": ALL,
}


@pytest.fixture(scope="module")
def photographs(drawn_once, tmp_path_factory):
    """The `few` card's images cut to several shapes, a few of them large or very small."""
    root = tmp_path_factory.mktemp("photographs")
    shutil.copytree(drawn_once / "split", root / "split")
    (root / "download").mkdir()
    large = photograph(*TWELVE_MP)
    asked = [row["image_id"] for row in select(root / "split", "train", ("base",))]
    unusual = {asked[0]: large, asked[1]: photograph(*THUMBNAIL)}

    def chosen(number: int, image_id: str, data: bytes) -> bytes:
        if image_id in unusual:
            return unusual[image_id]
        made = io.BytesIO()
        with Image.open(io.BytesIO(data)) as image:
            image.crop((0, 0, *SHAPES[number % len(SHAPES)])).save(made, "PNG")
        return made.getvalue()

    with cards_of(drawn_once):
        names = data_cards.load("few").classes
        replaced(drawn_once / "download", root / "download", names, chosen)
        freeze(root)
    return root


@pytest.fixture(scope="module")
def told(photographs, drawn_once, tmp_path_factory):
    """What became of each family, all of them through the line in one process."""
    root = tmp_path_factory.mktemp("families")
    shutil.copytree(drawn_once / "cards", root / "cards")
    given = [of_family(name, photographs, root / name) for name in ADAPTED]
    for family in given:
        (root / family["family"]).mkdir()
    path = root / "given.json"
    path.write_text(json.dumps(given, default=str))
    done = subprocess.run(
        [sys.executable, "-m", "tests.family_line", path],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root, json.loads((root / "told.json").read_text())


def of_family(name: str, made, folder) -> dict:
    """The arguments of each stage for one family."""
    # Whose start takes long with so many pieces; the bench of the real shape has vLLM run there.
    first = "transformers" if name == "real_vocabulary" else "vllm"
    engine = replace(
        ENGINE,
        backend=f"tests.family_line:{first}",
        processes=1,
        max_new_tokens=8,
        max_num_seqs=32,
        gpu_memory_utilization=0.5,
    )
    by_transformers = replace(engine, backend="tests.family_line:transformers")
    place = type("Place", (), {"root": folder / "base"})()
    place.download, place.split = made / "download", made / "split"
    asked = {"engine": engine.values(), "num_rollouts": 2, "max_unparsed_share": 1.0, "limit": 6}
    policy = folder / "train"
    given = {"policy": policy, "part": "val", "num_rollouts": 2, "shard_size": 100}
    evaluated = evaluate_arguments(place, engine=engine.values(), **given)
    again = {
        **evaluated,
        "output": folder / "again",
        "engine": by_transformers.values(),
        "modes": "one_step",
    }
    return {
        **({} if name == "real_vocabulary" else {"again": again}),
        "family": name,
        "words": ["beetle", "species"],
        "base": {
            "output": folder / "base",
            "model": folder / "model",
            "download": [place.download],
            "split": [place.split],
            "card": "few",
            "seed": 0,
            "prompt_style": "brief",
            "steps": 0,
            "batch_size": 1,
            "learning_rate": 0.0,
            "muon_learning_rate": 0.0,
            "question_share": 0.0,
            "blind_share": 0.0,
            "min_pixels": 784,
            "max_pixels": 7056,
            "dtype": "float32",
        },
        "propose": propose_arguments(place, output=folder / "propose", **asked),
        "train": arguments(
            made,
            output=folder / "train",
            base=folder / "base",
            policy=folder / "base",
            steps=2,
            micro_batch_size=8,
            lora_rank=4,
            lora_targets="vision projector language",
            learning_rate=1e-2,
            watch_every=2,
            watch_images=4,
            save_steps=2,
        ),
        "evaluate": {**evaluated, "output": folder / "evaluate"},
    }


@pytest.mark.parametrize("family", ADAPTED)
def test_a_family_goes_through_the_whole_line(family, told):
    root, found = told
    folder, found = root / family, found[family]
    assert not found["error"], found["error"]
    assert shards.read(folder / "propose", "rollouts").num_rows == 6 * 2
    log = shards.read(folder / "train", "train_log").to_pylist()
    assert [row["step"] for row in log] == [1, 2]
    assert any(row["grad_norm"] > 0 for row in log)
    assert (folder / "train" / "adapter" / "adapter_model.safetensors").exists()
    said = found["said"].splitlines()
    shared = "image and prompt" if family == "real_vocabulary" else "images are encoded once"
    assert any(line.startswith(f"train: {shared}") for line in said)
    assert any("agree on the first batch" in line for line in said)
    trained = next(line for line in said if "parameters are trained" in line)
    assert {part for part in PARTS if f"{part} 0 of" not in trained} == ADAPTED[family]
    fixed = any("min_pixels and max_pixels do nothing" in line for line in said)
    assert fixed == (family not in ("qwen3_vl", "real_vocabulary"))
    predictions = shards.read(folder / "evaluate", "predictions")
    assert set(predictions["mode"].to_pylist()) >= {"one_step", "majority", "two_step"}
    if family == "real_vocabulary":
        return
    # By vLLM and by the trainer's own library: the very answers, with the same probability.
    by_vllm, by_transformers = (
        shards.read(folder / name, "one_step").to_pylist() for name in ("evaluate", "again")
    )
    for one, other in zip(by_vllm, by_transformers, strict=True):
        assert one["completion"] == other["completion"]
        assert one["mean_logprob"] == pytest.approx(other["mean_logprob"], abs=1e-3)
