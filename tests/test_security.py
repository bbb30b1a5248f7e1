"""What the README's section on security says, held by tests where a test can hold it."""

import ast
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import data_cards
from pipeline import tasks
from pipeline.settings import SettingsError
from tasks import pages
from tasks.pages import style
from tests.conftest import ROOT
from tests.pipeline.test_stage import config  # noqa: F401 - a fixture

ROOMS = ("pipeline", "tasks", "training", "data_cards")
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_of_others_is_run_and_no_pickle_is_read(path):
    for name, call in calls(path):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("trust_remote_code", "False") == "False", f"{path}: {name}"
        assert given.get("shell", "False") == "False", f"{path}: {name}"
        assert name not in ("eval", "exec", "os.system", "marshal.loads"), path
        if name == "torch.load":  # the trainer's own checkpoint: tensors and plain values only
            assert given.get("weights_only") == "True", path
        assert not name.startswith(("joblib.", "dill.", "cloudpickle.")), path
        if name.startswith("pickle."):  # to a file without a name, in the process that reads it
            assert "TemporaryFile" in path.read_text()
            assert path == ROOT / "tasks/questions/builder.py"
        if name == "yaml.load":
            assert "SafeLoader" in given["Loader"], path
        if name.endswith(("extractall", "tar.extract", "archive.extract")):
            assert given.get("filter") == "'data'", f"{path}: {name}"


def test_a_card_cannot_make_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    text = "---\nversion: 1\nnoun: !!python/object/apply:os.system ['touch made']\n---\n"
    (tmp_path / "bad.md").write_text(text)
    with pytest.raises(data_cards.CardError, match="not valid YAML"):
        data_cards.load("bad")


def test_servers_that_tests_start_bind_to_loopback():
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text()
        assert "0.0." + "0.0" not in text, path
        for bound in re.findall(r'HTTPServer\(\("(.*?)"', text):
            assert bound == "127.0.0.1", path
        if "luigid()" in text and "--port" in text:
            assert '"--address", "127.0.0.1"' in text, path


def test_pages_load_nothing_and_run_nothing_but_their_own():
    policy = style.POLICY
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "script-src" not in policy
    assert not [path.name for path in SOURCES if "<!doctype html>" in path.read_text()]
    templates = {path.name: path.read_text() for path in pages.FOLDER.glob("*.jinja")}
    frames = [name for name, text in templates.items() if "<!doctype html>" in text]
    assert frames == ["frame.html.jinja"], "every page has the one frame, and so the policy"
    allowed = [
        a for text in templates.values() for a in re.findall(r"block allowed %}(.+?){%", text)
    ]
    assert allowed == ["; script-src 'sha256-{{ digest }}'"]
    assert sum(text.count("script-src") for text in templates.values()) == 1
    assert [name for name, text in templates.items() if "<script" in text] == [
        "questions.html.jinja"
    ]


def test_nothing_goes_round_the_escaping_of_templates():
    for path in pages.FOLDER.glob("*.jinja"):
        assert not re.search(
            r"\|\s*safe\b|autoescape|\son\w+=|(src|href)=.http", path.read_text()
        ), path
    marked = {
        str(path.relative_to(ROOT)): len(re.findall(r"\bMarkup\(\w", path.read_text()))
        for path in SOURCES
    }
    # Of pages: what a template printed, what is escaped, the policy; of figures: a style sheet and
    # a chart that a template drew.
    assert {name: n for name, n in marked.items() if n} == {
        "tasks/pages/__init__.py": 3,
        "tasks/pages/figures.py": 2,
    }


def test_a_template_escapes_whatever_it_prints():
    hostile = "<b>\x1b[31m\u202e\"'&"
    shown = pages.render(
        "rows.html.jinja", title=hostile, facts=[(hostile, 1)], tables=[], where=""
    )
    assert shown.count("&lt;b&gt;\ufffd[31m\ufffd&quot;&#x27;&amp;") == 3
    assert hostile[:3] not in shown
    with pytest.raises(UndefinedError):
        pages.render("rows.html.jinja", title="", facts=[], where="")


def test_a_password_in_an_address_is_refused_for_recipes_would_keep_it(config):  # noqa: F811
    config.set("engine", "server_url", "http://me:hunter2@127.0.0.1:8000/v1")
    with pytest.raises(SettingsError, match="OPENAI_API_KEY") as caught:
        tasks.Propose().arguments()
    assert "hunter2" not in str(caught.value)
