"""Checks README and docs: paths, links, commands, settings and examples."""

import configparser
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from luigi.task_register import Register

from pipeline import settings, tasks
from pipeline.__main__ import parser
from tasks.runtime.protocol import METHOD_NAMES
from tests.conftest import ROOT
from tests.pipeline.cli.test_plan import recipe  # noqa: F401  a fixture
from tests.pipeline.test_stage import config  # noqa: F401  a fixture

assert tasks
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
ROOMS = ("pipeline", "tasks", "training", "data_cards", "tests", "docs", "requirements")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of one kind; `""` are those without a language."""
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every command line in a block, and of those in a line of text."""
    text = page.read_text()
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in lines:
        line = re.sub(r"\s+#.*", "", line.removeprefix("$ "))
        if re.search(r"(^|\s|/)(luigi --module|python -m) ?", line) and "..." not in line:
            words = shlex.split(line)
            start = next(i for i, word in enumerate(words) if word.endswith(("luigi", "python")))
            found.append(words[start:])
    return found


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@each_page
def test_paths_are_there(page):
    # What a user makes: a card of their own, and in CONTRIBUTING a stage that is added.
    examples = {"data_cards/NAME.md", "data_cards/my_birds.md", "training/recipes/NAME.cfg"}
    if page.name == "CONTRIBUTING.md":
        examples |= {"tasks/polish.py", "tests/test_polish.py", "tasks/engine_NAME.py"}
    named = re.findall(rf"(?<![\w/.])((?:{'|'.join(ROOMS)})/[\w/.*-]*[\w/*])", page.read_text())
    for name in sorted(set(named) - examples):
        assert list(ROOT.glob(name.rstrip("/"))), name


@each_page
def test_commands_can_be_given(page, monkeypatch):
    for words in commands(page):
        if words[0].endswith("luigi"):
            _check_luigi(words)
            continue
        module, rest = words[2], words[3:]
        if module == "pipeline" and rest:
            known = parser().get_default("known")
            assert rest[0] in known or "|" in rest, words
            if (
                rest[0] in known
                and "|" not in rest
                and (len(rest) > 1 or rest[0] in ("plan", "status", "verify", "gc", "results"))
            ):
                parser().parse_args([word for word in rest if word != "[...]"])
        elif not module.startswith("luigi"):
            assert find_spec(module), words


def _check_luigi(words: list[str]) -> None:
    assert words[1:3] == ["--module", "pipeline.tasks"], words
    if len(words) == 3 or words[3] == "STAGE":
        return
    task = Register.get_task_cls(words[3])
    of_task = {f"--{name.replace('_', '-')}" for name, _ in task.get_params()}
    of_all = {
        f"--{section}-{key.replace('_', '-')}"
        for section, keys in settings.known_keys().items()
        for key in keys
    }
    for flag in (word for word in words if word.startswith("--")):
        assert flag in of_task | of_all | {
            "--module",
            "--workers",
            "--worker-keep-alive",
            "--help",
        }, flag


@each_page
def test_settings_that_are_named_stand_in_luigi_cfg(page):
    read = configparser.RawConfigParser()
    read.read(ROOT / "luigi.cfg")
    for section, key in re.findall(r"`\[(\w+)\] (\w+)", page.read_text()):
        assert read.has_option(section, key) or section == "resources", f"[{section}] {key}"


@each_page
def test_ini_blocks_are_read_as_they_stand(page, recipe):
    for block in blocks(page, "ini"):
        recipe(block)
        settings.check_configuration()
        read = configparser.RawConfigParser()
        read.read_string(block)
        for section in read.sections():
            family, _, scope = section.partition(":")
            given = {"dataset": "cub"} if "dataset" in settings.known_keys()[family] else {}
            if scope:
                given |= {"method" if scope in METHOD_NAMES else "dataset": scope}
            task = Register.get_task_cls(family)
            values = task(**given)
            for key, text in read[section].items():
                parsed = dict(task.get_params())[key].parse(text)
                assert getattr(values, key) == dict(task.get_params())[key].normalize(parsed)


def test_the_readme_is_a_first_screen_and_not_a_manual():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    linked = set(re.findall(r"\(docs/([\w.]+\.md)\)", (ROOT / "README.md").read_text()))
    assert pages == linked, "each page is named in the README"
