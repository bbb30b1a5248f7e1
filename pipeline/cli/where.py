"""A condition on the rows of a table, in SQL: what follows WHERE, as DuckDB understands it.

    truth_injected AND truth_share < 0.2
    mode = 'two_step' AND NOT correct
    finish_reason IN ('length', 'refused') OR 'beetle' IN completion

DuckDB sees the columns that the condition names, a batch of rows at a time, and nothing else: it may
open no file, load no extension and read no variable of this program.
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
_ROW = "row of the shard"  # the column beside those of the table
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
    """The condition names a column that this table has not: `name`."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


class Condition:
    """A condition that can be asked of any table with its columns.

    Raises ConditionError for a text that is not one expression of SQL, or names no column.
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
        """The columns that it names, sorted."""
        return sorted({name for name, *_ in self._names})

    def check(self, schema: pa.Schema) -> None:
        """Raise ConditionError, or NoColumn, if a table with this schema cannot be asked."""
        try:
            self._ask(schema.empty_table())
        except duckdb.BinderException as error:
            if lost := re.search(r'Referenced column "(.*?)" not found', str(error)):
                raise NoColumn(lost[1], self.unknown(lost[1], schema.names)) from error
            raise self._refused("does not fit its columns", error) from error
        except duckdb.Error as error:
            raise self._refused("does not fit its columns", error) from error

    def rows(self, path: Path) -> NDArray[np.int64]:
        """The rows of a Parquet file for which it holds, counted from 0, in order.

        Raises ConditionError for a value that cannot be compared, ShardError for a damaged file.
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
            except ShardError as error:  # DuckDB would tell of it in words of its own
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
        chosen = self._connection.from_arrow(table).filter(self._expression)
        if _ROW not in table.schema.names:
            chosen.fetchall()
            return np.empty(0, np.int64)
        return np.asarray(chosen.project(f'"{_ROW}"').fetchnumpy()[_ROW], np.int64)

    def _projection(self, schema: pa.Schema) -> list[str]:
        """Its columns as the file calls them: SQL tells no capital letters apart."""
        wanted = set()
        for name, *parts in self._names:
            for field in (field for field in schema if field.name.lower() == name.lower()):
                inner = field.type.names if parts and pa.types.is_struct(field.type) else ()
                # Of a struct (an image) only the part that is named, where one is.
                wanted.add(
                    f"{field.name}.{parts[0]}" if parts[0:1] and parts[0] in inner else field.name
                )
        return sorted(name for name in wanted if name.partition(".")[0] not in wanted - {name})

    def unknown(self, name: str, known: list[str]) -> str:
        """What to say of a name that is none of the columns `known`."""
        if f'"{name}"' in self.text:
            return (
                f"--where: there is no column {name!r}; a text stands in single quotes: '{name}', "
                "double ones are for the names of columns"
            )
        return f"--where: there is no column {name!r}{nearest(name, known)}"

    def _refused(self, how: str, error: Exception) -> ConditionError:
        said = str(error).splitlines()[0].partition("Error: ")
        told = f"--where {self.text!r} {how}: {said[2] or said[0]}"
        if re.search(r"\bis\s+(not\s+)?none\b", self.text, re.IGNORECASE):
            told = f"--where {self.text!r} {how}: write NULL in place of None"
        return ConditionError(f"{told}; write a condition {EXAMPLE}")


def nearest(name: str, known: list[str]) -> str:
    """What to say after a name that is unknown."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(sorted(known))}"


def _references(parsed: Any) -> Iterator[list[str]]:
    """The names of the columns in DuckDB's own syntax tree."""
    if isinstance(parsed, dict):
        if parsed.get("class") == "COLUMN_REF":
            yield parsed["column_names"]
        for value in parsed.values():
            yield from _references(value)
    elif isinstance(parsed, list):
        for value in parsed:
            yield from _references(value)
