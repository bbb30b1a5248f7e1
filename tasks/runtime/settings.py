"""Settings of a stage: a frozen dataclass whose fields carry their help, choices and bounds.

A setting is declared once. Luigi's parameters are made from these fields (`pipeline.parameters`), an
artifact's recipe.json holds them under the same names, and the stage's function takes the dataclass.

    @dataclass(frozen=True, kw_only=True)
    class JudgeSettings(Settings):
        section = "Judge"
        attempts: int = setting("of a request, with backoff", at_least=1, significant=False)
"""

import dataclasses
import difflib
import enum
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from tasks.runtime.errors import StageError

KEY = "setting"
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    list: "a list",
    dict: "an object",
    types.NoneType: "null",
}


@dataclass(frozen=True)
class Rule:
    """What a setting's value must be, and whether it can change a result (`significant`).

    The value must be one of `choices`; with `several` it names some of them, separated by spaces.
    Fingerprints leave out a setting with its value `unset`, so that a new setting that is not used
    keeps the artifacts of before.
    """

    help: str = ""
    choices: tuple[str, ...] = ()
    several: bool = False
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    significant: bool = True
    unset: Any = None

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
    unset: Any = None,
    default: Any = dataclasses.MISSING,
) -> Any:
    """A field of a stage's settings, with the rule for its value. Its default is `unset`, if that is set."""
    default = unset if default is dataclasses.MISSING and unset is not None else default
    rule = Rule(help, tuple(choices), several, at_least, at_most, above, significant, unset)
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


def json_or_text(text: str) -> Any:
    """The text read as JSON, or as it is where it is none: a word needs no quotation marks."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def rules(kind: type[Settings]) -> dict[str, tuple[Any, Rule]]:
    """Name -> (type, rule) of each setting, in the order of declaration."""
    if kind not in _RULES:
        hints = typing.get_type_hints(kind)
        of_each = {f.name: (hints[f.name], f.metadata.get(KEY, Rule())) for f in fields(kind)}
        _RULES[kind] = of_each
    return _RULES[kind]


def mistyped(value: Any, kind: Any) -> str | None:
    """Why a value does not have the type of its setting or argument; None where it has."""
    kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
    words = [word for each in kinds if _is_enum(each) for word in _enum_values(each)]
    if words and isinstance(value, str):
        return None if value in words else f"must be {_one_of(words)}; got {value!r}"
    if any(_fits(value, each) for each in kinds):
        return None
    if float in kinds and isinstance(value, float):
        return f"must be a finite number; got {value!r}"
    allowed = " or ".join(dict.fromkeys(map(_word, kinds)))
    return f"must be {allowed}; got {value!r}"


def _fits(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    if origin in (int, float) and isinstance(value, bool):
        return False
    if origin is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if origin is list and isinstance(value, list):
        return all(_fits(item, each) for item in value for each in typing.get_args(kind))
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    # Any other annotation than a class, such as Any (a class itself since Python 3.11), allows all.
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def _word(kind: Any) -> str:
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return _one_of([repr(value) for value in typing.get_args(kind)])
    if origin is list and typing.get_args(kind):
        return f"a list, each item {_word(typing.get_args(kind)[0])}"
    return WORDS.get(origin, f"a {getattr(origin, '__name__', origin)}")


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _enum_values(kind: Any) -> list[str]:
    return [member.value for member in kind]


def converted(value: Any, kind: Any) -> Any:
    """A JSON value as the type `kind`, where JSON has no such type: int to float, text to Path."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (Path, Path | None) and isinstance(value, str):
        return Path(value)
    if kind == list[Path] and isinstance(value, list):
        return [Path(item) if isinstance(item, str) else item for item in value]
    return value


def plain(value: Any) -> Any:
    """A value as JSON has it: paths as texts, and containers, Luigi's frozen ones too, as its own."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def instalments(section: str, text: str, total: int) -> tuple[int, ...]:
    """The numbers of samples in a setting such as "4 8", those from `total` on left out.

    Raises StageError unless they are whole, positive and ascending.
    """
    words = text.replace(",", " ").split()
    counts = [int(word) if word.isdecimal() else 0 for word in words]
    if counts != sorted(set(counts)) or 0 in counts:
        raise StageError(
            f"[{section}] instalments must be ascending numbers of samples, such as 4 8; got {text!r}"
        )
    return tuple(count for count in counts if count < total)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or else up to 40 known ones."""
    by_lower = {other.lower(): other for other in known}
    if close := difflib.get_close_matches(name.lower(), by_lower, 1):
        return f"; did you mean {by_lower[close[0]]}?"
    return f"; known: {', '.join(by_lower.values())}" if len(by_lower) <= 40 else ""


def _one_of(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
