"""Sections of one dataset or one method, such as [Train:cub], and where a value stands.

The section of the dataset is read first, and over it that of the set that the task works on: one set of
a mix, or the set in `on`. That of the method comes last. The names in a mix are sorted. The command line
(`--Train-steps 5`) takes precedence.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from luigi import configuration
from luigi.cmdline_parser import CmdlineParser

import data_cards
from tasks.runtime.protocol import METHOD_NAMES, ZERO_SHOT
from tasks.runtime.settings import nearest

# Stages that work on one set, also for a mix, and so have no settings of a mix.
OF_ONE_SET = ("Download", "Split")
# Stages that may have settings of a method. Others are the same for all methods, which are compared.
OF_METHOD = ("Propose", "BuildMCQ", "Train")


def sections(family: str, values: Mapping[str, Any]) -> list[str]:
    """The sections that hold for a task with these parameters, each read over those before it."""
    dataset = "+".join(sorted(str(values.get("dataset", "")).split("+")))
    of_set = values.get("on") or values.get("subset") or dataset
    names = dict.fromkeys((dataset, of_set, values.get("method", "")))
    return [family, *(f"{family}:{name}" for name in names if name)]


def own_settings(family: str, params: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values that sections such as [Train:cub] and [Train:virft] set for a task."""
    config = configuration.get_config()
    options = _options()
    return {
        key: parameter.parse(config.get(section, key))
        for section in sections(family, values)[1:]
        for key, parameter in params
        if config.has_option(section, key) and options.get(f"{family}_{key}") is None
    }


def section_of(family: str, key: str, values: Mapping[str, Any]) -> str:
    """The section in which the value of a task's key stands."""
    config = configuration.get_config()
    names = sections(family, values)
    return next((name for name in reversed(names) if config.has_option(name, key)), family)


def located(error: str, values: Mapping[str, Any], line: bool = True) -> str:
    """A message `[Section] key ...` with the file and section where the value of that key stands.

    Of two keys (`[Section] key and key: ...`) it is the one that does not stand with the defaults. With
    `line` a value may stand on the command line, too.
    """
    found = re.match(r"\[(\w+)\] (\w+)(?: and (\w+):)?", error)
    if not found:
        return f"luigi.cfg: {error}"
    family, *keys = filter(None, found.groups())
    options = _options() if line else {}
    given = [options.get(f"{family}_{key}") for key in keys]
    given += [options.get(key) for key in keys if options.get("root_task") == family]
    if any(value is not None for value in given):
        return f"command line: {error}"
    places = [
        (name, file_of(name, key)) for key in keys for name in [section_of(family, key, values)]
    ]
    default = (family, "luigi.cfg")
    section, file = next((place for place in places if place != default), default)
    return f"{file}: [{section}] {error[found.start(2) :]}"


def file_of(section: str, key: str = "") -> str:
    """The file that sets a key, or that has a section: luigi.cfg, unless an overlay does."""
    origins = getattr(configuration.get_config(), "origins", {})
    if key:
        return origins.get((section, key), "luigi.cfg")
    files = [path for (name, _), path in origins.items() if name == section]
    return files[-1] if files else "luigi.cfg"


def fault(section: str, scope: str, keys: Iterable[str]) -> str:
    """What is wrong with a section `[section:scope]`, whose scope is a dataset or a method; or empty."""
    if scope in METHOD_NAMES:
        if section not in OF_METHOD:
            return f"{section} is the same for all methods"
        never = (
            f"{scope} is the base policy, which is never trained; [{section}] does not hold for it"
        )
        return never if scope == ZERO_SHOT else ""
    if "dataset" not in keys:
        return f"{section} has no settings by dataset"
    names = sorted(scope.split("+"))
    if joined := [name for name in names if name in METHOD_NAMES]:
        return f"{joined[0]} is a method, and methods cannot be joined; write one section for each"
    if "+".join(names) != scope:
        return f"write [{section}:{'+'.join(names)}]"
    if len(names) > 1 and section in OF_ONE_SET:
        each = " and ".join(f"[{section}:{name}]" for name in names)
        return f"{section} works on one set at a time; write {each}"
    if missing := [name for name in names if not data_cards.exists(name)]:
        known = [*data_cards.known(), *(METHOD_NAMES if section in OF_METHOD else ())]
        return f"no data card and no method is named {missing[0]!r}{nearest(missing[0], known)}"
    return ""


def _options() -> dict[str, Any]:
    """The options of Luigi's command line; empty where it was not called."""
    line = CmdlineParser.get_instance()
    return vars(line.known_args) if line else {}
