"""A filter over rows, written as a Python comparison and turned into one of Arrow's.

    truth_injected and truth_share < 0.5
    mode == "two_step" and not correct
    finish_reason in ["length", "refused"] or "beetle" in completion

Only names of columns, constants, comparisons, `and`, `or`, `not`, `in`, `is None` and `len()` are
understood; nothing is evaluated by Python.
"""

import ast
import difflib
import operator
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
EXAMPLE = "such as: truth_share < 0.5 and not truth_injected"


class WhereError(ValueError):
    """A filter that cannot be used; the message is one sentence."""


def columns(text: str) -> list[str]:
    """The columns that a filter names. Raises WhereError when it is none."""
    return sorted({n.id for n in ast.walk(_parsed(text)) if isinstance(n, ast.Name)} - {"len"})


def expression(text: str, schema: pa.Schema) -> pc.Expression:
    """The filter for a table with this schema. Raises WhereError naming what does not fit."""
    for name in columns(text):
        if name not in schema.names:
            raise WhereError(f"--where: there is no column {name!r}{nearest(name, schema.names)}")
    made = _Maker(schema).visit(_parsed(text))
    if not isinstance(made, pc.Expression):
        raise WhereError(f"--where {text!r} names no column; write a comparison {EXAMPLE}")
    try:  # a comparison of a number with a text is found here, and not in the first of many files
        schema.empty_table().filter(made)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise WhereError(f"--where {text!r} does not fit its columns: {_first(error)}") from error
    return made


def nearest(name: str, known: list[str]) -> str:
    """What to say after a name that is unknown."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(sorted(known))}"


class _Maker(ast.NodeVisitor):
    """Builds the expression from the syntax tree, and refuses every node that it does not know."""

    def __init__(self, schema: pa.Schema):
        self.schema = schema

    def generic_visit(self, node: ast.AST) -> Any:
        raise WhereError(f"--where does not understand {ast.unparse(node)!r}; write {EXAMPLE}")

    def visit_Name(self, node: ast.Name) -> Any:
        return pc.field(node.id)

    def visit_Constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, bool | int | float | str):
            return self.generic_visit(node)
        return node.value

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            return -self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return ~self._told(node.operand)
        return self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
        made = self._told(node.values[0])
        for value in node.values[1:]:
            made = join(made, self._told(value))
        return made

    def visit_Call(self, node: ast.Call) -> Any:
        length = isinstance(node.func, ast.Name) and node.func.id == "len"
        if not length or len(node.args) != 1 or not isinstance(node.args[0], ast.Name):
            return self.generic_visit(node)
        field = self.visit(node.args[0])
        kind = self.schema.field(node.args[0].id).type
        return pc.list_value_length(field) if pa.types.is_list(kind) else pc.utf8_length(field)

    def visit_Compare(self, node: ast.Compare) -> Any:
        made, left = None, node.left
        for how, right in zip(node.ops, node.comparators, strict=True):
            one = self._pair(left, how, right)
            made, left = one if made is None else made & one, right
        return made

    def _pair(self, left: ast.expr, how: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(how, ast.In | ast.NotIn):
            found = self._within(left, right)
            return ~found if isinstance(how, ast.NotIn) else found
        if isinstance(right, ast.Constant) and right.value is None:
            null = self.visit(left).is_null()
            return null if isinstance(how, ast.Is | ast.Eq) else ~null
        compare = COMPARISONS.get(type(how))
        if compare is None:
            return self.generic_visit(right)
        return compare(self.visit(left), self.visit(right))

    def _within(self, left: ast.expr, right: ast.expr) -> Any:
        if isinstance(right, ast.List | ast.Tuple):
            return self.visit(left).isin([self.visit(item) for item in right.elts])
        if not (isinstance(left, ast.Constant) and isinstance(right, ast.Name)):
            return self.generic_visit(right)
        field, text = self.visit(right), str(left.value)
        if pa.types.is_list(self.schema.field(right.id).type):
            pattern = f"(^|\x1f){re.escape(text)}(\x1f|$)"
            return pc.match_substring_regex(pc.binary_join(field, "\x1f"), pattern)
        return pc.match_substring(field, text)

    def _told(self, node: ast.expr) -> Any:
        made = self.visit(node)
        return made if isinstance(made, pc.Expression) else self.generic_visit(node)


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise WhereError(
            f"--where {text!r} cannot be read; write a comparison {EXAMPLE}"
        ) from error


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
