"""python -m pipeline status, verify, invalidate, gc, diff: told from the artifacts alone."""

import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

from pipeline import __main__ as workbench
from pipeline import tasks
from pipeline.artifacts import store
from pipeline.cli import status, tree, verify
from tasks.build_mcq import build_mcq
from tasks.runtime.protocol import PROGRESS_FILE
from tasks.tables import schemas, shards
from tests.conftest import mcq_arguments, run_stage
from tests.pipeline.test_stage import config  # noqa: F401 - a fixture


def commit(root: Path, place: str, name: str, stage: str, made: Path, **manifest) -> Path:
    """An artifact of its own, from the files in `made`."""
    partial = root / place / f"{name}.partial"
    shutil.copytree(made, partial)
    identity = {
        "stage": stage, "fingerprint": name, "inputs": {}, "settings": {}, "code_version": 1,
        "seconds": 1.0, "source_sha256": "", **manifest,
    }  # fmt: skip
    store.commit(partial, root / place / name, identity)
    return root / place / name


@pytest.fixture
def root(rollouts, monkeypatch) -> Path:
    """Download, Split, Propose and BuildMCQ of the `few` card, committed."""
    made = rollouts.root / "mcq"
    made.mkdir()
    run_stage(build_mcq, made, **mcq_arguments(rollouts))
    root = rollouts.root / "artifacts"
    data = {"download": "d1", "split": "s1"}
    commit(root, "few/download", "d1", "Download", rollouts.download)
    commit(root, "few/split", "s1", "Split", rollouts.split, inputs={"download": "d1"})
    commit(root, "few/round0/propose", "p1", "Propose", rollouts.propose, inputs=data)
    settings = {"answer_from": "label", "num_options": 5}
    inputs = {**data, "propose": "p1"}
    commit(root, "few/dive_k/round0/build_mcq", "m1", "BuildMCQ", made, inputs=inputs, settings=settings)  # fmt: skip
    (rollouts.root / "luigi.cfg").write_text(f"[run]\nartifacts = {root}\ndataset = few\n")
    monkeypatch.chdir(rollouts.root)
    return root


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
    try:
        workbench.main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


def writable(path: Path) -> Path:
    path.parent.chmod(0o755)
    path.chmod(0o644)
    return path


def test_sound_artifacts_have_no_problems(root, monkeypatch, capsys):
    assert run(monkeypatch, "verify") == 0
    assert "4 artifacts, 0 problems" in capsys.readouterr().out


def test_a_flipped_bit_is_found_wherever_it_is(root):
    rng = random.Random(0)
    folders = list(status.artifacts(root))
    files = [folder / name for folder in folders for name in store.read_manifest(folder)["files"]]
    for _ in range(100):
        path = writable(rng.choice([file for file in files if file.stat().st_size]))
        original = path.read_bytes()
        data = bytearray(original)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        (problem,) = verify.check(root, [path.parent])
        assert problem.startswith(f"{path} is not what was written")
        assert "invalidate" in problem
        path.write_bytes(original)


def test_missing_and_added_files_are_named(root, monkeypatch, capsys):
    folder = root / "few/round0/propose/p1"
    writable(folder / "stats.json").unlink()
    (folder / "note.txt").write_text("mine")
    assert run(monkeypatch, "verify", "propose", "--json") == 1
    found = json.loads(capsys.readouterr().out)["problems"]
    assert len(found) == 2
    assert "note.txt is not in the manifest" in found[0]
    assert "stats.json is missing" in found[1]


def test_a_quick_check_compares_names_and_sizes_and_reads_no_table(root, monkeypatch, capsys):
    assert run(monkeypatch, "verify", "--quick") == 0
    assert "4 artifacts, 0 problems" in capsys.readouterr().out
    folder = root / "few/round0/propose/p1"
    shard = writable(folder / "rollouts-00000.parquet")
    data = shard.read_bytes()
    shard.write_bytes(bytes(len(data)))
    monkeypatch.setattr(verify, "_unlike", None)
    assert run(monkeypatch, "verify", "--quick") == 0, "of the right size"
    shard.write_bytes(data[:-1])
    writable(folder / "stats.json").unlink()
    (folder / "more").mkdir()
    (folder / "more" / "note.txt").write_text("mine")
    capsys.readouterr()
    assert run(monkeypatch, "verify", "propose", "--quick", "--json") == 1
    found = json.loads(capsys.readouterr().out)["problems"]
    assert len(found) == 3
    assert "more/note.txt is not in the manifest" in found[0]
    sizes = f"{len(data) - 1:,} bytes, not {len(data):,}"
    assert f"rollouts-00000.parquet is not what was written ({sizes})" in " ".join(found)
    assert "stats.json is missing" in " ".join(found)


def test_questions_that_do_not_fit_their_inputs_are_found(root, rollouts):
    place, inputs = (
        "few/dive_k/round0/build_mcq",
        {"download": "d1", "split": "s1", "propose": "p1"},
    )
    rows = shards.read(root / place / "m1", "mcq").to_pylist()
    for name, change, told in (
        ("m2", {"image_id": "few/train/none.png"}, "mcq has 1 images that .* has not"),
        ("m3", {"option_class_ids": [-7] * len(rows[0]["options"])}, "is not its image's class"),
    ):
        made = rollouts.root / name
        made.mkdir()
        shards.write(made / "mcq-00000.parquet", [rows[0] | change, *rows[1:]], schemas.mcq())
        folder = commit(root, place, name, "BuildMCQ", made, inputs=inputs)
        (found,) = verify.check(root, [folder])
        assert re.search(told, found)


def test_gc_keeps_what_current_artifacts_were_made_from(root, rollouts, monkeypatch, capsys):
    assert status.garbage(root) == []
    commit(root, "few/round0/propose", "p2", "Propose", rollouts.propose, inputs={"split": "s1"})
    assert status.garbage(root) == [], "p1 is no longer current, but the questions are made from it"
    made = rollouts.root / "mcq"
    commit(root, "few/dive_k/round0/build_mcq", "m2", "BuildMCQ", made, inputs={"propose": "p2"})
    assert [folder.name for folder, _ in status.garbage(root)] == ["m1", "p1"]
    assert run(monkeypatch, "gc") == 0
    assert "2 artifacts" in capsys.readouterr().out
    assert (root / "few/round0/propose/p1").exists(), "a dry run"
    assert run(monkeypatch, "gc", "--delete") == 0
    assert sorted(folder.name for folder in status.artifacts(root)) == ["d1", "m2", "p2", "s1"]


def test_invalidate_deletes_a_stage_and_if_asked_what_was_made_from_it(root, monkeypatch, capsys):
    assert run(monkeypatch, "invalidate", "build_mcq") == 0
    assert not (root / "few/dive_k/round0/build_mcq/current").is_symlink()
    assert run(monkeypatch, "invalidate", "split", "--downstream") == 0
    assert [folder.name for folder in status.artifacts(root)] == ["d1"]
    assert capsys.readouterr().out.count("deleted") == 3


def test_an_artifact_that_is_no_sets_is_found_beside_them(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text("{}")
    shared = commit(root, "base_policy", "b1", "BasePolicy", tmp_path / "made")
    assert run(monkeypatch, "inspect", "base_policy") == 0
    assert "BasePolicy b1" in capsys.readouterr().out
    assert run(monkeypatch, "verify", "base_policy") == 0
    own = commit(root, "few/base_policy", "b2", "BasePolicy", tmp_path / "made")
    assert run(monkeypatch, "invalidate", "base_policy") == 0
    assert shared.exists()
    assert not own.exists()
    assert run(monkeypatch, "invalidate", "base_policy") == 0
    assert not shared.exists()


def test_a_misspelt_stage_is_met_with_the_nearest(root, monkeypatch, capsys):
    assert run(monkeypatch, "invalidate", "propos") == 1
    assert "no artifact 'propos'" in (error := capsys.readouterr().err)
    assert "did you mean propose?" in error


def test_diff_says_what_differs(root, rollouts, monkeypatch, capsys):
    place, one = "few/dive_k/round0/build_mcq", root / "few/dive_k/round0/build_mcq/m1"
    settings = {"answer_from": "label", "num_options": 4}
    other = commit(root, place, "m2", "BuildMCQ", rollouts.root / "mcq", settings=settings)
    assert run(monkeypatch, "diff", str(one), str(other)) == 0
    told = capsys.readouterr().out
    assert "num_options 5 -> 4" in told
    assert "input propose changed" in told
    assert "files are the same" in told
    assert run(monkeypatch, "diff", str(one), str(root)) == 1


def test_status_tells_done_partial_stale_and_missing(config, tmp_path):
    config.set("run", "artifacts", str(tmp_path))
    train = tasks.TrainDiVE(dataset="beetles", method="dive_k", seed=0)
    stages = {f"{s.task_family}{getattr(s, 'refresh_round', '')}": s for s in status.graph(train)}
    empty = tmp_path / "empty"
    empty.mkdir()
    download, split = stages["Download"], stages["Split"]
    place = str(download.folder.parent.relative_to(tmp_path))
    identity = {key: value for key, value in download.identity.items() if key != "stage"}
    commit(tmp_path, place, download.folder.name, "Download", empty, **identity)
    place = str(split.folder.parent.relative_to(tmp_path))
    identity = json.loads(json.dumps(split.identity))
    del identity["stage"]
    identity["settings"]["val_share"] = 0.3
    identity["inputs"]["download"] = "another"
    commit(tmp_path, place, "0123456789abcdef", "Split", empty, **identity)
    partial = stages["Propose0"].folder.with_name(stages["Propose0"].folder.name + ".partial")
    partial.mkdir(parents=True)
    (partial / "rollouts-00000.parquet").write_text("")
    rows = {f"{r['stage']}{'' if r['round'] is None else r['round']}": r for r in map(status.describe, stages.values())}  # fmt: skip
    assert rows["Download"]["state"] == "done"
    assert rows["Download"]["why"] == ["tasks/download.py changed since, and code_version did not"]
    assert rows["Split"]["state"] == "stale"
    assert rows["Split"]["why"] == ["val_share 0.3 -> 0.1", "input download changed"]
    assert (rows["Propose0"]["state"], rows["Propose0"]["shards"]) == ("partial", 1)
    assert rows["Train1"]["state"] == "missing"
    told = tree.lines(list(rows.values()))
    assert told[-1] == "a run would do 11 of 12 stages"
    assert any("1 shards finished" in line for line in told)
    assert rows["Split"]["requires"] == [rows["Download"]["fingerprint"]]


def test_finished_shards_are_those_of_the_table_at_hand_and_of_how_many(config, tmp_path):
    config.set("run", "artifacts", str(tmp_path))
    for stage, tables, recipe, progress in (
        (tasks.Download(dataset="beetles"), ["images"], {}, {"total": 2928, "shard": 1000}),
        (tasks.BuildMCQ(), ["mcq", "candidates"], {"shard_size": 500}, {"total": 3, "unit": "shards"}),
        (tasks.Evaluate(method="zero_shot"), ["one_step"] * 2 + ["rollouts"], {"shard_size": 200}, {"total": 600}),
    ):  # fmt: skip
        partial = store.partial_of(stage.folder)
        partial.mkdir(parents=True)
        for number, table in enumerate(tables):
            path = partial / f"{table}-{tables[:number].count(table):05d}.parquet"
            path.touch()
            os.utime(path, (number, number))
        (partial / store.RECIPE).write_text(json.dumps(recipe))
        (partial / PROGRESS_FILE).write_text(json.dumps({"what": "x", "unit": "images"} | progress))
        row = status.describe(stage)
        assert (row["state"], row["shards"], row["of"]) == ("partial", 1, 3), stage.task_family
