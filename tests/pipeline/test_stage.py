"""The graph: fingerprints, what re-runs after a change, settings that are refused, import rules."""

import json
import subprocess
import sys
from pathlib import Path

import luigi
import pytest
from luigi import configuration
from luigi.task_register import Register

from pipeline import methods, tasks
from pipeline.artifacts import source_code, store
from pipeline.settings import GRAPH, OPERANDS, SettingsError, check_configuration
from pipeline.stage import Stage
from pipeline.stages.data import EMBEDDED_WEIGHTS
from pipeline.stages.engine import engine
from tasks.runtime.command import bind
from tests.conftest import ROOT, write_few_card

HEAVY = ("torch", "transformers", "trl", "vllm", "peft", "ray", "accelerate")


@pytest.fixture
def config(monkeypatch):
    """The default luigi.cfg, to be changed freely; tasks are made anew afterwards."""
    parser = configuration.LuigiConfigParser()
    parser.read(ROOT / "luigi.cfg")
    monkeypatch.setattr(configuration.LuigiConfigParser, "_instance", parser)
    Register.clear_instance_cache()
    yield parser
    Register.clear_instance_cache()


def fingerprints() -> dict[str, str]:
    """Every stage of the default graph, by task family and round."""
    Register.clear_instance_cache()
    report = tasks.Report(dataset="beetles", method="dive_k", seed=0)
    stages = [s for s in [*tasks.lineage(report), report] if s.dataset == "beetles"]
    stages = [s for s in stages if not getattr(s, "on", "")]  # nor what a policy says of other sets
    return {
        f"{s.task_family}/{getattr(s, 'method', '')}/{getattr(s, 'refresh_round', '')}": s.fingerprint
        for s in stages
    }


# Every setting of every stage: a changed value, and the stages that must change with it. Anything
# downstream of a stage changes too; nothing else may.
ALWAYS = {"Evaluate/dive_k/1", "Report/dive_k/"}
ROUND1 = {"Propose/dive_k/1", "BuildMCQ/dive_k/1", "Train/dive_k/1"} | ALWAYS
BELOW = {
    "Train": {"Train/dive_k/0"} | ROUND1,
    "BuildMCQ": {"BuildMCQ/dive_k/0", "Train/dive_k/0"} | ROUND1,
    "Propose": {"Propose/dive_k/0", "BuildMCQ/dive_k/0", "Train/dive_k/0"} | ROUND1,
    "Evaluate": {"Evaluate/zero_shot/0"} | ALWAYS,
}
BELOW["BasePolicy"] = BELOW["Propose"] | BELOW["Evaluate"] | {"BasePolicy//"}
BELOW["Split"] = BELOW["BasePolicy"] | {"Split//"}
BELOW["Download"] = BELOW["Split"] | {"Download//"}
BELOW["engine"] = BELOW["Propose"] | BELOW["Evaluate"]
OTHER_VALUES = {
    "protocol": "all",
    "model": "some/folder",
    "dtype": "bfloat16",
    "prompt": "closed_list",
    "min_options": "3",
    "top_up": "random",
    "vocabulary": "open",
    "options_from": "text",
    "answer_from": "majority",
    "order": "curriculum",
    "freeze": "vision",
    "lora_targets": "vision",
    "quantize": "nf4",
    "keep_policy": "best",
    "part": "val",
    "modes": "one_step two_step",
    "datasets": "pets",
    "rewards": '{"letter": 1.0}',
    "trl": '{"beta": 0.5}',
    "backend": "transformers",
    "list_position": "before_image",
    "seeds": "engine",
    "mirror": "true",
    "carry_over": "false",
    "check_memory": "false",
    "shared_prefix": "false",
    "check_shared_prefix": "false",
    "check_largest_batch": "true",
    "refresh": "unsolved",
    "solved": "retire",
    "train_caps": '{"*": 7}',
}


# What a refresh does is no business of the first round, and its details none of refresh = all.
DIFFERENT = {"refresh": ROUND1, "refresh_share": set(), "solved_at": set(), "solved": set()}
DIFFERENT["datasets"] = {"Report/dive_k/"}  # which shows further evaluations
DEFAULT: dict[str, str] = {}  # of luigi.cfg with a policy that is taught, made once
WITH = {"quantize": ("Train", "lora_rank", "4")}  # what else must be set


def matrix():
    for section in BELOW:
        for name, parameter in Register.get_task_cls(section).get_params():
            if name not in (*GRAPH, *OPERANDS):
                yield pytest.param(section, name, parameter, id=f"{section}.{name}")


@pytest.mark.parametrize(("section", "name", "parameter"), matrix())
def test_a_changed_setting_reruns_its_stage_and_what_hangs_below_it(
    config, section, name, parameter
):
    config.set("BasePolicy", "model", "tiny")  # taught on the set's own images
    if not DEFAULT:
        DEFAULT.update(fingerprints())
    before = DEFAULT
    if name in WITH:
        config.set(*WITH[name])
        before = fingerprints()
    old = config.get(section, name)
    number = isinstance(parameter, luigi.IntParameter | luigi.FloatParameter)
    value = parameter.parse(old)
    share = number and getattr(getattr(parameter, "rule", None), "at_most", None) == 1
    new = (
        {"bfloat16": "float32"}.get(old)
        or OTHER_VALUES.get(name)
        or (str(value / 2 + 0.07 if share else value + 1) if number else "stepwise")
    )
    config.set(section, name, new)
    changed = {key for key, value in fingerprints().items() if value != before[key]}
    if name == "prompt_style":  # BasePolicy is taught in these words
        assert changed == BELOW["BasePolicy"]
    elif name in DIFFERENT:
        assert changed == DIFFERENT[name]
    else:
        assert changed == (BELOW[section] if parameter.significant else set())
    config.set(section, name, old)
    assert fingerprints() == before, "changed back, it must find the old artifacts"


def test_the_seed_changes_all_but_the_download(config):
    config.set("BasePolicy", "model", "tiny")
    before = fingerprints()
    config.set("run", "seed", "1")
    Register.clear_instance_cache()
    report = tasks.Report(dataset="beetles", method="dive_k", seed=1)
    stages = {s.task_family: s.fingerprint for s in [*tasks.lineage(report), report]}
    same = [family for family, value in stages.items() if value in before.values()]
    assert same == ["Download"]


def test_a_changed_split_file_is_a_changed_split(config, tmp_path):
    path = tmp_path / "split_zhou.json"
    config.set("Split", "split_file", str(path))
    seen = set()
    for text in ("{}", "{ }"):
        path.write_text(text)
        seen.add(fingerprints()["Split//"])
    assert len(seen) == 2


def test_a_published_model_is_one_artifact_for_all_sets_seeds_and_words(config):
    config.set("BasePolicy", "model", "some/folder")
    config.set("BasePolicy", "steps", "0")

    def made(dataset: str = "beetles", seed: int = 0) -> tasks.BasePolicy:
        Register.clear_instance_cache()
        return tasks.BasePolicy(dataset=dataset, seed=seed)

    first = made()
    assert first.folder == Path("artifacts/base_policy").resolve() / first.fingerprint
    assert first.requires() == []
    assert first.module == "training.adopt"
    taught = ("seed", "batch_size", "learning_rate", "question_share", "prompt_style")
    assert not set(first.arguments()) & {*taught, "download", "split", "card"}
    assert {made("pets").task_id, made("pets+beetles", 3).task_id} == {first.task_id}
    for section, key, value in (
        ("engine", "prompt_style", "stepwise"),
        ("Split", "val_share", "0.3"),
        ("BasePolicy", "batch_size", "7"),
    ):
        config.set(section, key, value)
        assert made().fingerprint == first.fingerprint, key
    for key, value in (("model", "other"), ("max_pixels", "9000"), ("dtype", "bfloat16")):
        config.set("BasePolicy", key, value)
        assert made().fingerprint != first.fingerprint, key
    config.set("BasePolicy", "steps", "5")
    assert made().folder.parent == Path("artifacts/beetles/base_policy").resolve()
    assert made("pets").fingerprint != made().fingerprint


def test_the_embedded_policy_is_taken_as_it_is_for_beetles_and_taught_first_for_other_sets(config):
    def made(dataset: str) -> tasks.BasePolicy:
        Register.clear_instance_cache()
        return tasks.BasePolicy(dataset=dataset, seed=0)

    known, taught = made("beetles"), made("pets")
    assert (known.module, taught.module) == ("training.adopt", "training.sft")
    assert known.requires() == []
    assert made("beetles+pets").module == "training.sft"
    for stage in (known, taught):
        assert stage.identity["settings"]["weights"] == EMBEDDED_WEIGHTS
    config.set("BasePolicy", "steps", "0")
    assert made("pets").folder == made("beetles").folder == known.folder


def test_whoever_asks_an_adapter_requires_the_base_below_it(config):
    def asking() -> dict[str, Stage]:
        Register.clear_instance_cache()
        chain = {"dataset": "beetles", "method": "dive_k", "seed": 0}
        return {
            "propose": tasks.Propose(refresh_round=1, subset="", **chain),
            "evaluate": tasks.Evaluate(refresh_round=1, subset="", **chain),
        }

    for rank, required in (("0", False), ("8", True)):
        config.set("Train", "lora_rank", rank)
        base = tasks.BasePolicy(dataset="beetles", seed=0)
        for name, stage in asking().items():
            found = {needed.task_id for needed in stage.requires()}
            assert (base.task_id in found) == required, name
            assert base.fingerprint not in stage.identity["inputs"].values()


def test_no_two_stages_share_a_folder(config):
    report = tasks.Report(dataset="beetles", method="dive_k", seed=0)
    folders = [stage.folder for stage in tasks.lineage(report)]
    assert len(set(folders)) == len(folders) == 11


def stages_of_a_mix() -> dict[str, Stage]:
    train = tasks.TrainDiVE(dataset="pets+beetles", method="dive_k", seed=0)
    found = [stage for report in train.requires() for stage in [*tasks.lineage(report), report]]
    return {
        f"{s.task_family}/{getattr(s, 'subset', '') or s.dataset}/{getattr(s, 'refresh_round', '')}": s
        for s in found
    }


def test_a_mix_trains_one_policy_on_the_questions_of_every_set(config):
    found = stages_of_a_mix()
    assert {key for key in found if key.startswith("Train")} == {
        "Train/pets+beetles/0",
        "Train/pets+beetles/1",
    }
    train = found["Train/pets+beetles/0"]
    assert train.arguments()["card"] == "beetles+pets"
    assert train.arguments()["mcq"] == [
        str(found[f"BuildMCQ/{name}/0"].folder) for name in ("beetles", "pets")
    ]
    again = found["Propose/pets/1"]
    assert again.arguments()["card"] == "pets"
    assert again.needs()["policy"].fingerprint == train.fingerprint
    assert (
        found["Evaluate/pets/1"].needs()["policy"].fingerprint
        == found["Train/pets+beetles/1"].fingerprint
    )
    folders = [stage.folder for stage in found.values()]
    assert len({*folders}) == len(folders)


def test_the_sets_of_a_mix_share_their_images_with_runs_of_their_own(config):
    mixed, alone = stages_of_a_mix(), tasks.Split(dataset="pets", seed=0)
    assert mixed["Split/pets/"].folder == alone.folder
    other = tasks.Train(dataset="beetles+pets", method="dive_k", refresh_round=0, seed=0)
    assert other.folder == mixed["Train/pets+beetles/0"].folder, "order means nothing"


def test_a_stage_of_one_set_asked_for_a_mix_stands_for_each_set(config):
    both = tasks.Propose(dataset="beetles+pets", method="dive_k", refresh_round=0, seed=0)
    assert [stage.subset for stage in both.requires()] == ["beetles", "pets"]
    assert [stage.dataset for stage in tasks.Split(dataset="beetles+pets").requires()] == [
        "beetles",
        "pets",
    ]
    assert not both.complete()


def test_a_cap_of_one_set_leaves_the_others_as_they_are(config):
    before = {name: tasks.Split(dataset=name).fingerprint for name in ("beetles", "pets")}
    config.set("Split", "train_caps", '{"pets": 50}')
    Register.clear_instance_cache()
    after = {name: tasks.Split(dataset=name).fingerprint for name in ("beetles", "pets")}
    assert after["beetles"] == before["beetles"]
    assert after["pets"] != before["pets"]
    assert tasks.Split(dataset="pets").arguments()["train_caps"] == {"pets": 50}


@pytest.mark.parametrize(
    ("dataset", "subset", "told"),
    [
        ("beetles+", "", "joined by +"),
        ("beetles+beetles", "", "joined by +"),
        ("beetles+pets", "cub", "subset 'cub' is not in dataset 'beetles.pets'"),
    ],
)
def test_a_mix_that_cannot_be_is_named(config, dataset, subset, told):
    with pytest.raises(SettingsError, match=told):
        _ = tasks.Evaluate(dataset=dataset, subset=subset).fingerprint


def test_a_cap_for_a_card_that_is_not_there_is_named(config):
    config.set("Split", "train_caps", '{"beatles": 50}')
    with pytest.raises(SettingsError, match="train_caps: there is no data card 'beatles'"):
        _ = tasks.Split(dataset="beetles").fingerprint


def evaluation(**changed) -> tasks.Evaluate:
    given = {"dataset": "beetles", "method": "dive_k", "refresh_round": 1, "seed": 0, "subset": ""}
    return tasks.Evaluate(**given | changed)


def test_an_evaluation_on_another_set_reads_that_sets_images(config):
    there = evaluation(on="pets")
    assert there.set_name == "pets"
    assert there.needs()["split"].folder == tasks.Split(dataset="pets", seed=0).folder
    assert there.needs()["policy"].folder == evaluation().needs()["policy"].folder
    assert there.folder.parts[-6:-1] == ("beetles", "dive_k", "round1", "evaluate", "pets")
    assert there.arguments()["card"] == "pets"
    assert evaluation(on="beetles").folder == evaluation().folder, "its own set"
    mixed = evaluation(dataset="beetles+pets", on="pets")
    assert mixed.folder == evaluation(dataset="beetles+pets", subset="pets").folder
    assert mixed.parts() == []


def test_the_order_of_modes_means_nothing_and_an_unknown_one_is_named(config):
    first = evaluation(modes="two_step one_step").folder
    assert first == evaluation(modes="one_step two_step").folder != evaluation().folder
    with pytest.raises(
        SettingsError, match=r"\[Evaluate\].* modes must name some of one_step, .*'two_steps'"
    ):
        _ = evaluation(modes="two_steps").fingerprint


def test_a_published_policy_is_evaluated_without_training(config, tmp_path):
    stage = evaluation(policy="owner/model@v1", on="pets")
    assert set(stage.needs()) == {"download", "split"}
    assert stage.arguments()["policy"] == "owner/model@v1"
    assert stage.folder.parts[-4:-1] == ("owner--model@v1", "evaluate", "pets")
    assert stage.folder.name != evaluation(policy="owner/model@v2", on="pets").folder.name
    with pytest.raises(SettingsError, match="no such folder, and no hub id"):
        _ = evaluation(policy=str(tmp_path / "none")).folder


@pytest.mark.parametrize("key", ["policy", "on"])
def test_what_one_evaluation_is_given_cannot_stand_in_the_configuration(config, key):
    config.set("Evaluate", key, "some/model")
    with pytest.raises(SettingsError, match=rf"\[Evaluate\] has no key '{key}'"):
        evaluation()


def test_cross_evaluations_are_of_all_other_sets_and_both_policies(config):
    report = tasks.Report(dataset="beetles", method="dive_k", seed=0)
    assert tasks.cross_evaluations(report) == {}
    config.set("Evaluate", "datasets", "pets beetles cub")
    Register.clear_instance_cache()
    found = tasks.cross_evaluations(report)
    assert {name: list(of) for name, of in found.items()} == {
        "pets": ["zero_shot", "dive_k"],
        "cub": ["zero_shot", "dive_k"],
    }
    assert found["cub"]["dive_k"].folder == evaluation(on="cub").folder
    assert found["cub"]["zero_shot"].folder == (
        evaluation(method="zero_shot", refresh_round=0, on="cub").folder
    )
    config.set("Evaluate", "datasets", "pest")
    Register.clear_instance_cache()
    with pytest.raises(SettingsError, match="datasets: there is no data card 'pest'"):
        tasks.cross_evaluations(report)


def test_a_judge_is_asked_only_where_one_is_named(config):
    report = tasks.Report(dataset="beetles", method="dive_k", subset="", seed=0)
    assert tasks.judgements(report) == {}
    with pytest.raises(SettingsError, match=r"\[Judge\] needs a url and a model"):
        _ = tasks.Judge(dataset="beetles", method="dive_k", refresh_round=1).fingerprint
    config.set("Judge", "url", "http://127.0.0.1:1/v1")
    config.set("Judge", "model", "m")
    Register.clear_instance_cache()
    found = tasks.judgements(report)
    assert list(found) == ["zero_shot", "dive_k"]
    assert found["dive_k"].arguments()["evaluate"] == str(evaluation().folder)
    assert found["dive_k"].folder.parts[-3:-1] == ("round1", "judge")
    before = found["dive_k"].fingerprint
    for key, value, same in (("url", "http://other/v1", True), ("model", "n", False)):
        config.set("Judge", key, value)
        Register.clear_instance_cache()
        assert (tasks.judgements(report)["dive_k"].fingerprint == before) == same


def test_every_stage_function_takes_what_its_task_gives(config):
    from tasks.evaluate import evaluate
    from tasks.judge import judge

    config.set("Judge", "url", "http://127.0.0.1:1/v1")
    config.set("Judge", "model", "m")
    Register.clear_instance_cache()
    stages = [(evaluation(), evaluate), (evaluation(policy="a/b"), evaluate)]
    stages.append((tasks.Judge(dataset="beetles", method="dive_k", refresh_round=1), judge))
    for stage, function in stages:
        bind(function, {"output": "output", **stage.arguments()})


def test_a_stage_run_alone_takes_the_graph_parameters_of_the_configuration(config):
    assert tasks.BuildMCQ().refresh_round == 0
    assert tasks.BuildMCQ(refresh_round=1).folder.parts[-4:-1] == ("dive_k", "round1", "build_mcq")


@pytest.mark.parametrize(
    ("section", "key", "told"),
    [
        (
            "BuildMCQ",
            "num_option",
            r"\[BuildMCQ\] has no key 'num_option'; did you mean num_options",
        ),
        ("BuildMQC", "num_options", r"unknown section \[BuildMQC\]; did you mean BuildMCQ"),
        ("run", "rounbs", r"\[run\] has no key 'rounbs'; did you mean rounds"),
    ],
)
def test_a_misspelt_section_or_key_is_an_error_that_names_it(config, section, key, told):
    if not config.has_section(section):
        config.add_section(section)
    config.set(section, key, "3")
    with pytest.raises(SettingsError, match=told):
        check_configuration()


def test_a_missing_setting_names_section_and_key(config):
    config.remove_option("BuildMCQ", "num_options")
    with pytest.raises(SettingsError, match=r"section \[BuildMCQ\] lacks num_options"):
        tasks.BuildMCQ()


def test_a_value_of_the_wrong_type_names_its_section(config):
    config.set("BuildMCQ", "num_options", "five")
    with pytest.raises(
        SettingsError, match=r"\[BuildMCQ\] num_options must be a whole number; got 'five'"
    ):
        tasks.BuildMCQ()


def test_who_holds_the_seed_is_one_of_two_words_and_its_old_key_is_told(config):
    config.set("engine", "seeds", "requests")
    with pytest.raises(
        SettingsError, match=r"\[engine\] seeds must be request or engine; got 'requests'"
    ):
        engine()
    config.set("engine", "seeds", "engine")
    config.set("engine", "server_seeds", "false")
    with pytest.raises(
        SettingsError, match="no key 'server_seeds'; set seeds = request, or engine"
    ):
        engine()


def test_unknown_card_and_method_are_named(config):
    with pytest.raises(SettingsError, match=r"no data card .*beatles.*known cards: .*beetles"):
        _ = tasks.Download(dataset="beatles").fingerprint
    with pytest.raises(SettingsError, match=r"unknown method 'dive'; known: dive_k"):
        _ = tasks.BuildMCQ(method="dive").fingerprint


def luigi_run(folder: Path, *arguments: str, **changed) -> subprocess.CompletedProcess:
    """The luigi command in a folder whose luigi.cfg is the default one with lines changed."""
    text = (ROOT / "luigi.cfg").read_text()
    for old, new in changed.get("replace", {}).items():
        assert old in text
        text = text.replace(old, new)
    (folder / "luigi.cfg").write_text(text)
    write_few_card(folder / "cards")
    command = [sys.executable, "-m", "luigi", "--module", "pipeline.tasks", *arguments]
    command += ["--dataset", changed.get("dataset", "few")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.process
def test_the_command_reports_a_misspelt_key_in_one_sentence(tmp_path):
    ran = luigi_run(
        tmp_path, "TrainDiVE", replace={"num_options = 4\nprompt": "num_optons = 4\nprompt"}
    )
    assert ran.returncode == 1
    assert "error: luigi.cfg: section [Evaluate] has no key 'num_optons'" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.process
def test_a_failing_stage_exits_with_30_and_one_sentence(tmp_path):
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "gone.md").write_text(
        "---\nversion: 1\nnoun: bird\nkind: species\nsource: {kind: folder, path: nowhere}\n"
        "classes: [kite, buzzard]\n---\n"
    )
    ran = luigi_run(tmp_path, "Download", dataset="gone")
    assert ran.returncode == 30, ran.stderr
    assert "Download failed: card gone: source.path nowhere is not a folder" in ran.stderr
    assert "Traceback" not in ran.stderr
    made = [p.name for p in (tmp_path / "artifacts" / "gone" / "download").iterdir()]
    assert [name for name in made if not name.endswith(".partial")] == []


@pytest.mark.process
def test_an_unchanged_rerun_runs_nothing(tmp_path):
    assert luigi_run(tmp_path, "Download").returncode == 0
    manifests = list(tmp_path.glob("artifacts/few/*/*/manifest.json"))
    before = {path: path.stat().st_mtime_ns for path in manifests}
    again = luigi_run(tmp_path, "Download")
    assert again.returncode == 0
    assert "1 complete ones were encountered" in again.stderr
    assert "ran successfully" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "artifacts/few/download/current/images-00000.parquet").exists()


def test_the_link_current_follows_a_setting_changed_back_all_the_way_up(config, tmp_path):
    """Luigi asks nothing above a complete stage, yet its inputs' links must lead back as well."""
    config.set("run", "artifacts", str(tmp_path))

    def made(share: str) -> tuple[tasks.Split, Path]:
        config.set("Download", "max_reject_share", share)
        Register.clear_instance_cache()
        stage = tasks.Split(dataset="beetles")
        download = stage.needs()["download"]
        for folder in (stage.folder, download.folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / store.MANIFEST).write_text("{}")
        return stage, download.folder

    for share in ("0.02", "0.03", "0.02"):
        stage, download = made(share)
        assert stage.complete()
        assert (download.parent / "current").resolve() == download.resolve()


def test_importing_the_graph_loads_nothing_heavy():
    code = f"import pipeline.tasks, sys; print([m for m in {(*HEAVY, 'pyarrow', 'pandas')} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.strip() == "[]", ran.stderr


# The artifact's life, without luigi.

ECHO = """
import json, sys
from pathlib import Path
config = json.loads(Path(sys.argv[1]).read_text())
(Path(config["output"]) / "out.txt").write_text("done")
(Path(config["output"]) / "stats.json").write_text('{"tokens": 7}')
"""


def test_a_committed_artifact_is_frozen_and_described(tmp_path, monkeypatch):
    (tmp_path / "echo_stage.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "round0" / "echo" / "abc"
    store.build(folder, "echo_stage", {}, {"stage": "Echo", "fingerprint": "abc"})
    manifest = store.read_manifest(folder)
    assert manifest["files"]["out.txt"]["bytes"] == 4
    assert manifest["peak_memory_mb"] > 1
    assert manifest["stats"] == {"tokens": 7}
    assert (folder / "out.txt").stat().st_mode & 0o222 == 0
    assert folder.stat().st_mode & 0o222 == 0
    assert (folder.parent / "current").resolve() == folder
    assert sorted(p.name for p in folder.parent.iterdir()) == ["abc", "current"]
    recorded = json.loads((folder / "recipe.json").read_text())
    assert recorded["output"] == str(folder)


def test_a_child_killed_by_a_signal_is_named_with_its_memory(tmp_path, monkeypatch):
    (tmp_path / "dying_stage.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(store.StageFailed, match=r"Dying was killed by SIGKILL after \d+ MB"):
        store.build(tmp_path / "x" / "abc", "dying_stage", {}, {"stage": "Dying"})
    assert not (tmp_path / "x" / "abc").exists()


@pytest.mark.process
def test_two_builders_of_one_artifact_one_works_the_other_is_told_who(tmp_path, monkeypatch):
    (tmp_path / "slow_stage.py").write_text("import time; time.sleep(1.5)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(store, "LOCK_PATIENCE", 0.3)
    code = (
        "from pathlib import Path; from pipeline.artifacts import store;"
        f"store.build(Path({str(tmp_path / 'x' / 'abc')!r}), 'slow_stage', {{}}, {{'stage': 'Slow'}})"
    )
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    lock = tmp_path / "x" / "abc.lock"
    for _ in range(200):
        if lock.exists() and lock.read_text():
            break
        time_sleep(0.05)
    with pytest.raises(store.StageFailed, match=rf"process {first.pid} is already building"):
        store.build(tmp_path / "x" / "abc", "slow_stage", {}, {"stage": "Slow"})
    assert first.wait() == 0
    assert (tmp_path / "x" / "abc" / "manifest.json").exists()


def time_sleep(seconds: float) -> None:
    import time

    time.sleep(seconds)


def test_every_stage_names_a_module_that_exists():
    for name in (
        "Download",
        "Split",
        "BasePolicy",
        "Propose",
        "BuildMCQ",
        "Train",
        "Evaluate",
        "Judge",
        "Report",
    ):
        stage = Register.get_task_cls(name)
        assert issubclass(stage, Stage)
        if isinstance(stage.module, str):
            assert source_code.digests(stage.module), stage.module
    for method in methods.METHODS:  # these choose it by their method
        given = {"dataset": "beetles", "method": method, "refresh_round": 0, "seed": 0}
        for made in (tasks.BuildMCQ(subset="", **given), tasks.Train(**given)):
            assert source_code.digests(made.module), made.module


def test_names_in_a_prompt_are_not_punished_by_default(config):
    # A repetition penalty also counts words of the prompt, where the class names stand.
    assert config.getfloat("engine", "repetition_penalty") == 1.0
