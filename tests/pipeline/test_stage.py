"""The graph: fingerprints, what re-runs after a change, settings that are refused, import rules."""

import subprocess
import sys
from pathlib import Path

import luigi
import pytest
from luigi import configuration
from luigi.task_register import Register

from pipeline import methods, tasks
from pipeline.artifacts import source_code, store
from pipeline.settings import GRAPH, OPERANDS
from pipeline.stage import Stage
from pipeline.stages.data import EMBEDDED_WEIGHTS
from tests.conftest import ROOT

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
    "instalments": "4 16",
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
    "micro_batch_size": "96",
    "train_caps": '{"*": 7}',
}


# What a refresh does is no business of the first round, and its details none of refresh = all.
DIFFERENT = {"refresh": ROUND1, "refresh_share": set(), "solved_at": set(), "solved": set()}
DIFFERENT["entropy_weight"] = set()  # of training without labels
REFUSED = ("unlabelled_groups", "unlabelled_part")  # other values with a method that has labels
DIFFERENT["datasets"] = {"Report/dive_k/"}  # which shows further evaluations
DEFAULT: dict[str, str] = {}  # of luigi.cfg with a policy that is taught, made once
WITH = {  # what else must be set
    "instalments": [("Evaluate", "modes", "adaptive")],
    "quantize": [("Train", "lora_rank", "4")],
    "questions_per_step": [("Train", "micro_batch_size", "8")],
    "num_generations": [("Train", "micro_batch_size", "8")],
    "think_target": [("Train", "rewards", '{"letter": 1.0, "think_length": 1.0}')],
    "think_limit": [("Train", "rewards", '{"letter": 1.0, "think_length": 1.0}')],
    "epochs": [("Train", "steps", "0"), ("Train", "epochs", "1"), ("Train", "carry_over", "false")],
}


def matrix():
    for section in BELOW:
        for name, parameter in Register.get_task_cls(section).get_params():
            if name not in (*GRAPH, *OPERANDS, *REFUSED):
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
        for other in WITH[name]:
            config.set(*other)
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
