"""The house: who may import whom, no cycles, small rooms; docs/architecture.md shows what is so.

python -m tests.test_architecture      writes the two generated parts of that page
"""

import ast
import graphlib
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "architecture.md"
TOPS = ("data_cards", "tasks", "training", "pipeline")
# A folder, and the folders that its own modules may import from. The flat modules of `tasks` are
# doors, as are those of `training` but for its settings and rewards: no module imports a door, but
# pipeline/ does.
TASKS = "runtime, tables, language, ingest, engines, questions, evaluation, pages"
MAY_IMPORT = {
    "data_cards": "",
    "tasks/runtime": "data_cards, tasks/tables",
    "tasks/tables": "data_cards, tasks/runtime",
    "tasks/language": "data_cards, tasks/runtime",
    "tasks/ingest": "data_cards, tasks/{runtime, tables, language}",
    "tasks/engines": "data_cards, tasks/{runtime, tables, language}",
    "tasks/questions": "data_cards, tasks/{runtime, tables, language}",
    "tasks/evaluation": "data_cards, tasks/{runtime, tables, language, ingest, engines, questions}",
    "tasks/pages": "data_cards, tasks/{runtime, tables, language, questions, evaluation}",
    "tasks": "data_cards, every room of tasks",
    "training/model": "tasks/{runtime, language, engines}, training",
    "training/data": "data_cards, tasks/{runtime, tables, language}, training",
    "training/shared_prefix": "tasks/{runtime, engines}, training/model",
    "training/resources": "tasks/{runtime, language, engines}, training, training/{model, shared_prefix}",
    "training/loop": "data_cards, tasks/{runtime, tables, language, engines}, "
    "training, training/{model, data, shared_prefix, resources}",
    "training": "data_cards, tasks/{runtime, tables, language, engines}, every room of training",
    "pipeline/artifacts": "tasks/{runtime, tables}",
    "pipeline/stages": "data_cards, pipeline, pipeline/artifacts, tasks, every room of tasks, training",
    "pipeline/cli": "everything",
    "pipeline": "data_cards, tasks/runtime, pipeline/{artifacts, stages, cli}",
}
NO_DOORS = tuple(  # flat, and to be imported
    f"training/{name}.py" for name in ("rewards", "round_rules", "settings", "trl_options")
)
HEAVY = ("torch", "transformers", "trl", "vllm", "peft", "ray", "accelerate")
FILES = [path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]


def room(path: Path) -> str:
    """The folder of a module, as the table has it: two levels, subfolders belong to their room."""
    return "/".join(path.relative_to(ROOT).parent.parts[:2])


def allowed(own: str) -> set[str]:
    """The rooms that a room may import, its own among them."""
    rooms, told = {own}, MAY_IMPORT[own]
    if told == "everything":
        return set(MAY_IMPORT)
    for top in re.findall(r"every room of (\w+)", told):
        rooms |= {name for name in MAY_IMPORT if name.startswith(f"{top}/")}
    told = re.sub(r"every room of \w+", "", told)
    for top, inner in re.findall(r"(\w+)/\{([^}]+)\}", told):
        rooms |= {f"{top}/{name.strip()}" for name in inner.split(",")}
    told = re.sub(r"\w+/\{[^}]+\}", "", told)
    return rooms | {name.strip() for name in told.split(",") if name.strip()}


def imported(path: Path) -> set[Path]:
    """The modules of ours that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] not in TOPS:
                continue
            places = (ROOT.joinpath(*parts[:length]) for length in range(len(parts), 0, -1))
            candidates = (
                p for place in places for p in (place.with_suffix(".py"), place / "__init__.py")
            )
            found.add(next(file for file in candidates if file.is_file()))
    return found - {path}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path):
    own = room(path)
    for other in imported(path):
        name = other.relative_to(ROOT).as_posix()
        assert room(other) in allowed(own), f"{own} must not import {name}"
        door = room(other) in ("tasks", "training") and other.name != "__init__.py"
        if own.split("/")[0] != "pipeline" and name not in NO_DOORS:
            assert not door, f"{name} is a door: nobody imports it"
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module.split(".")[0]]
        if not own.startswith("pipeline") or own == "pipeline/artifacts":
            assert "luigi" not in names, "only pipeline knows luigi"
        if node in tree.body and not own.startswith("training"):
            assert not set(names) & set(HEAVY), f"{names} must be imported where it is used"


def test_no_module_imports_itself_over_others():
    """Imports inside functions count: a cycle that is only put off is one all the same."""
    graph = {
        str(path.relative_to(ROOT)): {str(m.relative_to(ROOT)) for m in imported(path)}
        for path in FILES
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the modules


def test_no_room_imports_itself_over_others():
    graph = {name: allowed(name) & set(MAY_IMPORT) - {name} for name in MAY_IMPORT}
    # Errors and shards need one another; rooms read the settings and the rewards, which lie flat.
    graph["tasks/tables"] -= {"tasks/runtime"}
    for name in ("data", "model", "resources", "loop"):
        graph[f"training/{name}"] -= {"training"}
    graph["pipeline/stages"] -= {"pipeline"}
    graph["pipeline/cli"] -= {"pipeline"}
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_rooms_are_small():
    for folder in {path.parent for path in FILES}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 14, folder


def test_files_are_of_a_length_that_one_reads():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 300, path


def test_no_function_takes_more_than_ten_arguments():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                names = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                assert len(set(names) - {"self", "cls"}) <= 10, f"{path}: {node.name}"


def tree() -> str:
    """Every room and module, with the first sentence of its docstring."""
    lines = []

    def said(path: Path) -> str:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        return text.split("\n\n")[0].replace("\n", " ").rstrip(".")

    def walk(folder: Path, depth: int) -> None:
        lines.append(
            f"{'  ' * depth}{folder.name + '/':<{26 - 2 * depth}} {said(folder / '__init__.py')}"
        )
        modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        lines.extend(
            f"{'  ' * depth}  {path.name:<{24 - 2 * depth}} {said(path)}" for path in modules
        )
        for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
            walk(inner, depth + 1)

    for top in TOPS:
        walk(ROOT / top, 0)
    return "\n".join(lines) + "\n"


def table() -> str:
    """Who may import whom."""
    rows = [f"| `{name}/` | {told or 'nothing of ours'} |" for name, told in MAY_IMPORT.items()]
    return "| modules in | may import |\n|---|---|\n" + "\n".join(rows) + "\n"


def test_the_page_shows_what_is_so():
    text = PAGE.read_text()
    assert tree() in text, "python -m tests.test_architecture writes it"
    assert table() in text, "python -m tests.test_architecture writes it"


def write() -> None:
    """Write tree and table into the page."""
    text = PAGE.read_text()
    text = re.sub(r"\| modules in \|.*?\n\n", lambda _: table() + "\n", text, flags=re.DOTALL)
    text = re.sub(r"data_cards/  .*?(?=```)", lambda _: tree(), text, flags=re.DOTALL)
    PAGE.write_text(text)


if __name__ == "__main__":
    write()
