"""Settings of a stage: a frozen dataclass whose fields carry their help, choices and bounds.

A setting is declared once. Luigi's parameters are made from these fields (`pipeline.parameters`), an
artifact's recipe.json holds them under the same names, and the stage's function takes the dataclass.

    @dataclass(frozen=True, kw_only=True)
    class JudgeSettings(Settings):
        section = "Judge"
        attempts: int = setting("of a request, with backoff", at_least=1, significant=False)
"""

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from tasks.runtime.errors import StageError

KEY = "setting"
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Rule:
    """What a setting's value must be, and whether it can change a result (`significant`).

    The value must be one of `choices`; with `several` it names some of them, separated by spaces.
    """

    help: str = ""
    choices: tuple[str, ...] = ()
    several: bool = False
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    significant: bool = True

    def refusal(self, value: Any) -> str | None:
        """Why a value of the right type is not allowed; None where it is allowed."""
        if self.several:
            wrong = [word for word in value.replace(",", " ").split() if word not in self.choices]
            if wrong:
                return f"must name some of {', '.join(self.choices)}; got {wrong[0]!r}"
        elif self.choices and value not in self.choices:
            return f"must be {_one_of(self.choices)}; got {value!r}"
        limits = [
            ("at least", self.at_least, lambda limit: value >= limit),
            ("above", self.above, lambda limit: value > limit),
            ("at most", self.at_most, lambda limit: value <= limit),
        ]
        bounds = [(word, limit, holds) for word, limit, holds in limits if limit is not None]
        if all(holds(limit) for _, limit, holds in bounds):
            return None
        allowed = " and ".join(f"{word} {limit:g}" for word, limit, _ in bounds)
        return f"must be {allowed}; got {value!r}"


def setting(
    help: str = "",
    *,
    choices: Sequence[str] = (),
    several: bool = False,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    significant: bool = True,
    default: Any = dataclasses.MISSING,
) -> Any:
    """A field of a stage's settings, with the rule for its value."""
    rule = Rule(help, tuple(choices), several, at_least, at_most, above, significant)
    return dataclasses.field(default=default, metadata={KEY: rule})


_RULES: dict[Any, dict[str, tuple[Any, Rule]]] = {}  # computed once for each class


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of a stage's settings. A value of the wrong type or out of bounds raises StageError."""

    section: ClassVar[str] = ""  # the section of luigi.cfg

    def __post_init__(self) -> None:
        for name, (kind, rule) in rules(type(self)).items():
            value = converted(getattr(self, name), kind)
            object.__setattr__(self, name, value)
            problem = mistyped(value, kind) or rule.refusal(value)
            if problem:
                section = f"[{self.section}] " if self.section else ""
                raise StageError(f"{section}{name} {problem}")
        self.check()

    def check(self) -> None:
        """Raise StageError where values contradict one another, each of which is allowed alone."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Settings from a mapping, which may hold other keys as well."""
        return cls(**{name: values[name] for name in rules(cls) if name in values})

    def values(self) -> dict[str, Any]:
        """Name -> JSON value."""
        return {name: plain(getattr(self, name)) for name in rules(type(self))}


def rules(kind: type[Settings]) -> dict[str, tuple[Any, Rule]]:
    """Name -> (type, rule) of each setting, in the order of declaration."""
    if kind not in _RULES:
        hints = typing.get_type_hints(kind)
        of_each = {f.name: (hints[f.name], f.metadata.get(KEY, Rule())) for f in fields(kind)}
        _RULES[kind] = of_each
    return _RULES[kind]


def mistyped(value: Any, kind: Any) -> str | None:
    """Why a value does not have its setting's type; None where it has."""
    expected = typing.get_origin(kind) or kind
    if not isinstance(expected, type):  # a union, of a path and None
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole if expected is int else isinstance(value, expected)
    if fits and expected is float and not math.isfinite(value):
        return f"must be a finite number; got {value!r}"
    return (
        None if fits else f"must be {WORDS.get(expected, f'a {expected.__name__}')}; got {value!r}"
    )


def converted(value: Any, kind: Any) -> Any:
    """A JSON value as the type `kind`, where JSON has no such type: int to float, text to Path."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (Path, Path | None) and isinstance(value, str):
        return Path(value)
    if kind == list[Path] and isinstance(value, list):
        return [Path(item) for item in value]
    return value


def plain(value: Any) -> Any:
    """A value as JSON has it: paths as texts, and containers, Luigi's frozen ones too, as its own."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _one_of(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
