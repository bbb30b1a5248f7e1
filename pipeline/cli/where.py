"""Filter the rows of a table by a condition in SQL: the part after WHERE, as DuckDB reads it.

    truth_injected AND truth_share < 0.2
    mode = 'two_step' AND NOT correct
    finish_reason IN ('length', 'refused') OR 'beetle' IN completion

DuckDB is given only the columns that the condition names, one batch of rows at a time. It may open
no file, load no extension and read no variable of this program.
"""

import difflib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.runtime.errors import ShardError
from tasks.tables import shards

EXAMPLE = "such as: truth_share < 0.5 AND NOT truth_injected"
BATCH_ROWS = 1024
_ROW = "row of the shard"  # the name of an added column that numbers the rows
_CLOSED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
    "threads": 1,  # rows come in the order of the file
    "lock_configuration": True,
}


class ConditionError(ValueError):
    """A condition that cannot be used; the message is one sentence."""


class NoColumn(ConditionError):
    """The condition names a column `name` that this table does not have."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


class Condition:
    """A parsed condition, which can be applied to any table that has its columns.

    Raises ConditionError for a text that is not one SQL expression, or that names no column.
    """

    def __init__(self, text: str):
        self.text = text
        self._connection = duckdb.connect(config=_CLOSED)
        try:
            self._expression = duckdb.SQLExpression(text)
            query = f"SELECT * FROM t WHERE (\n{text}\n)"
            ((parsed,),) = self._connection.execute(
                "SELECT json_serialize_sql(?)", [query]
            ).fetchall()
        except (duckdb.Error, UnicodeError) as error:
            raise self._refused("cannot be read", error) from error
        self._names = list(_references(json.loads(parsed)))
        if not self._names:
            raise ConditionError(f"--where {text!r} names no column; write a condition {EXAMPLE}")

    @property
    def columns(self) -> list[str]:
        """The columns that the condition names, sorted."""
        return sorted({name for name, *_ in self._names})

    def check(self, schema: pa.Schema) -> None:
        """Raise ConditionError, or NoColumn, if the condition does not suit this schema."""
        try:
            self._ask(schema.empty_table())
        except duckdb.BinderException as error:
            if lost := re.search(r'Referenced column "(.*?)" not found', str(error)):
                raise NoColumn(lost[1], self.unknown(lost[1], schema.names)) from error
            raise self._refused("does not fit its columns", error) from error
        except duckdb.Error as error:
            raise self._refused("does not fit its columns", error) from error

    def rows(self, path: Path) -> NDArray[np.int64]:
        """The numbers of a Parquet file's rows for which the condition holds, from 0, ascending.

        Raises ConditionError for a value that cannot be compared, and ShardError for a damaged file.
        """
        batches = shards.iter_batches(path, self._projection(pq.read_schema(path)), BATCH_ROWS)
        failed: list[ShardError] = []

        def numbered() -> Iterator[pa.RecordBatch]:
            start = 0
            try:
                for batch in batches:
                    numbers = np.arange(start, start + batch.num_rows)
                    yield batch.append_column(_ROW, pa.array(numbers, pa.int64()))
                    start += batch.num_rows
            except ShardError as error:  # DuckDB would replace its message
                failed.append(error)
                raise

        stream = numbered()
        first = next(stream, None)
        if first is None:
            return np.empty(0, np.int64)
        try:
            return self._ask(
                pa.RecordBatchReader.from_batches(first.schema, itertools.chain([first], stream))
            )
        except (duckdb.Error, pa.ArrowException) as error:
            raise next(iter(failed), self._refused("does not fit its columns", error)) from error

    def _ask(self, table: Any) -> NDArray[np.int64]:
        fitting = self._connection.from_arrow(table).filter(self._expression)
        if _ROW not in table.schema.names:
            fitting.fetchall()
            return np.empty(0, np.int64)
        return np.asarray(fitting.project(f'"{_ROW}"').fetchnumpy()[_ROW], np.int64)

    def _projection(self, schema: pa.Schema) -> list[str]:
        """The condition's columns under the names that the file gives them: SQL ignores case."""
        wanted = set()
        for name, *parts in self._names:
            for field in (field for field in schema if field.name.lower() == name.lower()):
                inner = field.type.names if parts and pa.types.is_struct(field.type) else ()
                # Read only the field of a struct (an image) that the condition names, if it names one.
                wanted.add(
                    f"{field.name}.{parts[0]}" if parts[0:1] and parts[0] in inner else field.name
                )
        return sorted(name for name in wanted if name.partition(".")[0] not in wanted - {name})

    def unknown(self, name: str, known: list[str]) -> str:
        """The message for a name that is not among the columns `known`."""
        if f'"{name}"' in self.text:
            return (
                f"--where: there is no column {name!r}; a text stands in single quotes: '{name}', "
                "double ones are for the names of columns"
            )
        return f"--where: there is no column {name!r}{nearest(name, known)}"

    def _refused(self, how: str, error: Exception) -> ConditionError:
        parts = str(error).splitlines()[0].partition("Error: ")
        message = f"--where {self.text!r} {how}: {parts[2] or parts[0]}"
        if re.search(r"\bis\s+(not\s+)?none\b", self.text, re.IGNORECASE):
            message = f"--where {self.text!r} {how}: write NULL in place of None"
        return ConditionError(f"{message}; write a condition {EXAMPLE}")


def nearest(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(sorted(known))}"


def _references(parsed: Any) -> Iterator[list[str]]:
    """The column references in DuckDB's syntax tree, each as its parts (column, field)."""
    if isinstance(parsed, dict):
        if parsed.get("class") == "COLUMN_REF":
            yield parsed["column_names"]
        for value in parsed.values():
            yield from _references(value)
    elif isinstance(parsed, list):
        for value in parsed:
            yield from _references(value)
