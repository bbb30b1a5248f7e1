"""Makes Luigi's parameters from a stage's Settings class: one parameter for each field.

    @parameters(JudgeSettings)
    class Judge(OnAnySet): ...

A parameter refuses a wrong word or a number out of bounds when it reads it, before any stage runs.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import luigi

from tasks.runtime.settings import WORDS, Rule, Settings, converted, mistyped, plain, rules

S = TypeVar("S", bound=Settings)
T = TypeVar("T", bound=type)


class _Ruled(luigi.Parameter):
    """A parameter that checks its values against a setting's rule, and names itself in errors."""

    kind: Any
    rule: Rule

    def parse(self, text: str) -> Any:
        """Parse a text of luigi.cfg or the command line. Raises ValueError with a sentence."""
        try:
            value = super().parse(text)
        except ValueError as error:
            if self.rule.choices:
                raise ValueError(f"{self._attribute_name} {self.rule.refusal(text)}") from error
            wanted = WORDS.get(self.kind, "JSON")
            raise ValueError(f"{self._attribute_name} must be {wanted}; got {text!r}") from error
        return self._checked(value)

    def normalize(self, value: Any) -> Any:
        """Check a value that Python code passes. Raises ValueError as `parse` does."""
        if self.rule.choices and not self.rule.several and value not in self.rule.choices:
            raise ValueError(f"{self._attribute_name} {self.rule.refusal(value)}")
        return self._checked(super().normalize(value))

    def _checked(self, value: Any) -> Any:
        known = self.kind in (str, int, float, bool)  # Luigi keeps others in forms of its own
        value = converted(value, self.kind) if known else value
        problem = (known and mistyped(value, self.kind)) or self.rule.refusal(value)
        if problem:
            raise ValueError(f"{self._attribute_name} {problem}")
        return value


class Text(_Ruled, luigi.Parameter):
    """A text, or some of several words."""


class Choice(_Ruled, luigi.ChoiceParameter):
    """One of several words."""


class Whole(_Ruled, luigi.IntParameter):
    """A whole number."""


class Number(_Ruled, luigi.FloatParameter):
    """A number."""


class YesNo(_Ruled, luigi.BoolParameter):
    """true or false."""


class Object(_Ruled, luigi.DictParameter):
    """A JSON object, in which no key stands twice: of two values JSON would take the last."""

    def parse(self, text: str) -> Any:
        value = super().parse(text)
        if text:
            json.loads(text, object_pairs_hook=self._distinct)
        return value

    def _distinct(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for number, (key, _) in enumerate(pairs):
            if any(key == other for other, _ in pairs[:number]):
                raise ValueError(f"{self._attribute_name} has the key {key!r} twice; delete one")
        return dict(pairs)


class Sequence(_Ruled, luigi.ListParameter):
    """A JSON list."""


KINDS = {
    str: Text,
    Path: Text,
    int: Whole,
    float: Number,
    bool: YesNo,
    dict: Object,
    list: Sequence,
}


def parameter(kind: Any, rule: Rule) -> _Ruled:
    """Luigi's parameter for a setting of this type."""
    options: dict[str, Any] = {"significant": rule.significant}
    parameter_class: type[_Ruled] = KINDS[getattr(kind, "__origin__", kind)]
    if rule.choices and not rule.several:
        parameter_class, options["choices"] = Choice, rule.choices
    if kind is bool:
        options["parsing"] = luigi.BoolParameter.EXPLICIT_PARSING
    made_parameter = parameter_class(**options)
    made_parameter.kind, made_parameter.rule = kind, rule
    words = ", ".join(rule.choices)
    of_them = f"{'some' if rule.several else 'one'} of {words}" if words else ""
    made_parameter.description = "; ".join(filter(None, (rule.help, of_them))) or None
    return made_parameter


def parameters(settings: type[Settings]) -> Callable[[T], T]:
    """Decorate a task or config: it gets a parameter for each field of `settings`."""

    def decorate(task: T) -> T:
        for name, (kind, rule) in rules(settings).items():
            member = parameter(kind, rule)
            member.__set_name__(task, name)  # as the class statement would
            setattr(task, name, member)
        task.settings_kind = settings  # type: ignore[attr-defined]
        return task

    return decorate


def is_unset(value: Any, parameter: luigi.Parameter) -> bool:
    """Whether this value of a parameter stands for no setting at all."""
    unset = getattr(getattr(parameter, "rule", None), "unset", None)
    return unset is not None and plain(value) == unset


def settings_of(kind: type[S], values: Mapping[str, Any]) -> S:
    """Settings from the values of their parameters. Raises StageError where they contradict each other."""
    return kind(**{name: plain(values[name]) for name in rules(kind)})
