"""Which images a refresh asks again, by logged rewards, and that nothing of the others is lost."""

import random
from collections import Counter

import pytest

from tasks.build_mcq import build_mcq
from tasks.build_open import build_open
from tasks.propose import propose
from tasks.questions import refresh
from tasks.questions import rollouts as rollouts_module
from tasks.questions.settings import ProposeSettings
from tasks.runtime.errors import StageError
from tasks.tables import schemas, shards
from tasks.tables.ids import Ids
from tasks.tables.split_table import select
from tests.conftest import mcq_arguments, propose_arguments, run_stage, settings_of


def write_log(folder, rewards: dict[str, list[tuple[int, float]]], name: str = "letter"):
    """A Train artifact's completions: image -> (step, reward) of each completion."""
    folder.mkdir()
    rows = [
        {
            "step": step,
            "image_id": image_id,
            "mcq_id": "q",
            "completion": "",
            "advantage": 0.0,
            f"reward/{name}": paid,
        }
        for image_id, uses in rewards.items()
        for step, paid in uses
    ]
    shards.write(folder / "completions-00001.parquet", rows, schemas.completions([name]))
    return folder


def images(made) -> list[str]:
    return list(select(made.split, "train", ("base",)).ids)


def asked_again(made, **changed):
    out = made.root / "again"
    out.mkdir()
    given = propose_arguments(made, seed=1, previous=made.propose, train=made.root / "train")
    run_stage(propose, out, **{**given, **changed})
    return out


def by_image(folder) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in shards.read(folder, "rollouts").to_pylist():
        found.setdefault(row["image_id"], []).append(row["completion"])
    return found


def test_the_latest_use_counts(tmp_path):
    log = write_log(
        tmp_path / "t", {"a": [(1, 1.0), (7, 0.0), (7, 1.0)], "b": [(2, 0.0), (9, 1.0)]}
    )
    assert refresh.latest_rewards(log) == {"a": 0.5, "b": 1.0}
    other = write_log(tmp_path / "o", {"a": [(1, 1.0)]}, name="polite")
    with pytest.raises(StageError, match="logged no reward for answers"):
        refresh.latest_rewards(other)


@pytest.mark.parametrize("solved", ["keep", "retire"])
def test_unsolved_images_are_asked_again_and_the_others_kept_or_retired(rollouts, solved):
    order = images(rollouts)
    done = set(order[::3])
    uses = {image: [(5, 1.0 if image in done else 0.0)] * 4 for image in order[:-2]}
    write_log(rollouts.root / "train", uses)
    done -= set(order[-2:])  # never asked in training, so not solved
    out = asked_again(rollouts, refresh="unsolved", solved=solved)
    before, after = by_image(rollouts.propose), by_image(out)
    for image in order:
        if image not in done:
            assert len(after[image]) == 20
            assert after[image] != before[image]
        elif solved == "keep":
            assert after[image] == before[image]
        else:
            assert image not in after
    assert list(after) == [image for image in order if image in after], "in the order of images"
    assert not list(out.glob("fresh-*"))
    rollouts.propose = out
    (rollouts.root / "mcq").mkdir()
    run_stage(build_mcq, rollouts.root / "mcq", **mcq_arguments(rollouts))
    candidates = shards.read(rollouts.root / "mcq", "candidates").to_pylist()
    if solved == "retire":
        named = {row["image_id"] for row in shards.read_file(out / "retired.parquet").to_pylist()}
        assert named == done
        assert {row["image_id"] for row in candidates} == set(order) - done
    else:
        assert {row["image_id"] for row in candidates} == set(order)


def test_what_was_retired_stays_retired(rollouts):
    order = images(rollouts)
    write_log(rollouts.root / "train", {order[0]: [(1, 1.0)]})
    out = asked_again(rollouts, refresh="unsolved", solved="retire")
    write_log(rollouts.root / "train2", {order[1]: [(9, 1.0)]})
    settings = settings_of(ProposeSettings, refresh="unsolved", solved="retire")
    train = rollouts.root / "train2"
    chosen = refresh.plan(Ids(order), settings, previous=out, train=train, seed=0)
    assert chosen.retired == sorted(order[:2])
    assert list(chosen.asked) == order[2:]


def test_a_share_is_asked_again_by_lot(rollouts):
    order = images(rollouts)
    write_log(rollouts.root / "train", {order[0]: [(1, 1.0)]})
    out = asked_again(rollouts, refresh="sample", refresh_share=0.25)
    before, after = by_image(rollouts.propose), by_image(out)
    changed = Counter(after[image] != before[image] for image in order)
    assert changed[True] == round(0.25 * len(order))
    assert after.keys() == before.keys()


def test_where_everything_is_solved_and_kept_nothing_is_asked(rollouts):
    order = images(rollouts)
    write_log(rollouts.root / "train", {image: [(1, 1.0)] for image in order})
    out = asked_again(rollouts, refresh="unsolved", solved="keep")
    assert by_image(out) == by_image(rollouts.propose)


def test_a_refresh_of_everything_solved_is_told(rollouts):
    order = images(rollouts)
    write_log(rollouts.root / "train", {image: [(1, 1.0)] for image in order})
    with pytest.raises(StageError, match=r"every question of .* is solved"):
        asked_again(rollouts, refresh="unsolved", solved="retire")


def write_table(folder, table: str, images: list[str], size: int, word: str) -> None:
    """Two to four rollouts of each image, in shards of `size` images."""
    folder.mkdir(exist_ok=True)
    for index, part in enumerate(shards.chunks(images, size)):
        rows = [
            {
                "image_id": image, "rollout": number, "completion": f"{word} {image} {number}",
                "finish_reason": "stop", "num_tokens": 1, "mean_logprob": 0.0,
            }
            for image in part
            for number in range(2 + int(image) % 3)
        ]  # fmt: skip
        shards.write(shards.shard_path(folder, table, index), rows, schemas.rollouts())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [1, 4, 7, 50])
def test_new_and_kept_rollouts_are_merged_whatever_the_shards(tmp_path, monkeypatch, seed, size):
    draw = random.Random(seed)
    monkeypatch.setattr(rollouts_module, "BATCH_ROWS", draw.choice([1, 3, 1000]))
    order = [f"{number:02d}" for number in range(draw.randint(1, 40))]
    kind = [draw.choice("ak-") for _ in order]
    asked = [image for image, of in zip(order, kind, strict=True) if of == "a"]
    kept = [image for image, of in zip(order, kind, strict=True) if of == "k"]
    out, before = tmp_path / "out", tmp_path / "before"
    lost = set(draw.sample(kept, len(kept) // 3)) if seed % 2 else set()  # they have no rollouts
    held = [image for image in order if image not in lost]
    write_table(before, "rollouts", held, draw.choice([2, size]), "old")
    write_table(out, "fresh", asked, size, "new")
    plan = refresh.Plan(Ids(asked), Ids(kept), [])
    refresh.merge(out, "fresh", before, plan, Ids(order), size)
    left = [image for image in order if image in {*asked, *kept}]
    for index, part in enumerate(shards.chunks(left, size)):
        expected = [
            f"{'new' if image in asked else 'old'} {image} {number}"
            for image in part
            if image not in lost
            for number in range(2 + int(image) % 3)
        ]
        path = shards.shard_path(out, "rollouts", index)
        rows = shards.read_file(path).to_pylist() if expected else []
        assert [row["completion"] for row in rows] == expected
        path.unlink(missing_ok=not expected)
    assert not list(out.glob("*.parquet"))


def test_previous_rollouts_out_of_order_are_told(tmp_path):
    order = [f"{number:02d}" for number in range(20)]
    write_table(tmp_path / "before", "rollouts", order[::-1], 5, "old")
    write_table(tmp_path / "out", "fresh", order[:10], 5, "new")
    plan = refresh.Plan(Ids(order[:10]), Ids(order[10:]), [])
    with pytest.raises(
        StageError, match=r"before holds rollouts whose images are not in the order"
    ):
        refresh.merge(tmp_path / "out", "fresh", tmp_path / "before", plan, Ids(order), 2)
    assert list((tmp_path / "out").glob("fresh-*")), "nothing is lost"


@pytest.mark.parametrize(("key", "value"), [("refresh", "some"), ("solved", "burn")])
def test_unknown_settings_are_named(rollouts, key, value):
    with pytest.raises(StageError, match=f"got '{value}'"):
        asked_again(rollouts, **{key: value})


def test_open_questions_are_frozen_like_any_others(split_set):
    out = split_set.root / "open"
    out.mkdir()
    given = {"card": "few", "download": split_set.download, "split": split_set.split}
    run_stage(
        build_open, out, **given, prompt="closed_list", prompt_style="brief", shard_size=25, seed=0
    )
    rows = shards.read(out, "mcq").to_pylist()
    places = {row["image_id"]: row for row in select(split_set.split, "train", ("base",))}
    assert {row["image_id"] for row in rows} == set(places)
    for row in rows:
        assert row["options"] == [places[row["image_id"]]["class_name"]]
        assert row["option_class_ids"] == [places[row["image_id"]]["label"]]
        assert row["answer_letter"] == "A"
        assert "It is one of these: " in row["question"]
        assert row["image"]["bytes"]
    assert shards.read(out, "mcq").schema.equals(schemas.mcq())
