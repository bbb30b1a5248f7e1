"""Every table is one that `datasets` reads, with the metadata that it would write itself."""

import inspect
import subprocess
import sys

import pyarrow as pa
import pytest
from datasets import Features

from tasks.tables import schemas
from tests.conftest import ROOT

TABLES = [
    name
    for name, made in inspect.getmembers(schemas, inspect.isfunction)
    if inspect.signature(made).return_annotation is pa.Schema and not name.startswith("_")
]


@pytest.mark.parametrize("name", TABLES)
def test_the_metadata_are_those_of_datasets(name):
    made = getattr(schemas, name)
    schema = made(*[["a", "bé"]] * len(inspect.signature(made).parameters))
    assert schema.equals(Features.from_arrow_schema(schema).arrow_schema, check_metadata=True)


def test_all_kinds_of_columns_were_compared():
    assert {"images", "mcq", "candidates", "train_log", "rollouts"} <= set(TABLES)


@pytest.mark.process
def test_stages_start_without_datasets_and_pandas():
    stages = ("download", "split", "propose", "build_mcq", "evaluate", "report")
    imports = ", ".join(f"tasks.{stage}" for stage in stages)
    code = f"import sys, {imports}; sys.exit(str({{'datasets', 'pandas'}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
