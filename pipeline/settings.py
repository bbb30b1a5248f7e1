"""Checks luigi.cfg and its overlays: a misspelt section or key is an error, and so is a missing one.

Luigi itself ignores an unknown section, only warns of an unknown key, and names a missing one
without its section. Here every setting must stand in the configuration.

Two features go beyond Luigi. The environment variable `RECIPE=a.cfg,b.cfg` names overlays, which are
read over luigi.cfg in order. A section `[Train:cub]` holds for the dataset cub alone, and
`[Evaluate:cub]` also where cub is one set of a mix. `[Train:virft]` holds for one method alone.
"""

import os
import re
from configparser import InterpolationError
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import luigi
from luigi import configuration
from luigi.parameter import MissingParameterException
from luigi.task_register import Register

from pipeline.config_files import SettingsError as SettingsError  # also used from here
from pipeline.config_files import read_overlay
from pipeline.parameters import parameter, settings_of
from pipeline.scopes import fault, file_of, located, own_settings
from tasks.runtime.errors import StageError
from tasks.runtime.settings import Rule, Settings, nearest, rules

# Sections that Luigi reads itself (its configuration reference, "Configurable options").
LUIGI_SECTIONS = {
    "core",
    "worker",
    "scheduler",
    "retcode",
    "resources",
    "logging",
    "execution_summary",
    "task_history",
    "email",
    "batch_notifier",
}
ABSTRACT = (
    "Checked",
    "Stage",
    "OfSet",
    "Round",
    "RoundOfSet",
    "OnAnySet",
)  # base classes, which have no section of their own
# Keys of former versions, and the keys that replaced them.
RENAMED = {("engine", "server_seeds"): "seeds = request, or engine in place of false"}
# Parameters that a stage passes on to the stages it needs. Their defaults are in [run].
GRAPH = ("dataset", "subset", "method", "refresh_round", "seed")
# Parameters of a single stage, for the command line only: in luigi.cfg they would hold for all.
OPERANDS = ("on", "policy")

S = TypeVar("S", bound=Settings)


class Checked(luigi.Task):
    """The base of tasks and configs whose parameters must all be set, and all be known."""

    @classmethod
    def get_param_values(cls, params: Any, args: Any, kwargs: Any) -> Any:
        """Resolve parameters as Luigi does, with defaults from [run], and with clear errors."""
        check_configuration()
        config = configuration.get_config()
        family = cls.get_task_family()
        for name, _ in params:
            if name in GRAPH and name not in kwargs and not config.has_option(family, name):
                kwargs = {**kwargs, name: dict(params)[name].parse(config.get("run", name))}
        try:
            if not args:
                kwargs = {**own_settings(family, params, kwargs), **kwargs}
            return super().get_param_values(params, args, kwargs)
        except MissingParameterException as error:
            missing = [n for n, p in params if n not in kwargs and not p.has_task_value(family, n)]
            raise SettingsError(
                f"luigi.cfg: section [{family}] lacks {missing[0]}; add it, as in the default "
                f"luigi.cfg, or give --{family}-{missing[0].replace('_', '-')}"
            ) from error
        except ValueError as error:
            raise SettingsError(f"[{family}] {error.__cause__ or error}") from error

    def read(self, kind: type[S]) -> S:
        """The task's settings as an object. Raises SettingsError when they contradict each other."""
        try:
            return settings_of(kind, {name: getattr(self, name) for name in rules(kind)})
        except StageError as error:
            raise self.refusal(error) from error

    def refusal(self, error: StageError | str) -> SettingsError:
        """The error `[Section] key ...` with the file and the section where the key stands."""
        return SettingsError(located(str(error), self.param_kwargs))


def read_overlays() -> None:
    """Read the overlays that RECIPE names over luigi.cfg, once for each configuration.

    Raises SettingsError when one is missing, or cannot be read.
    """
    config = configuration.get_config()
    wanted = overlays()
    if wanted == getattr(config, "overlays_read", ()):
        return
    config.origins = {}
    for path in wanted:
        if not Path(path).is_file():
            raise SettingsError(f"RECIPE: there is no file {path!r}")
        config.origins |= dict.fromkeys(read_overlay(config, Path(path)), path)
    config.overlays_read = wanted


def overlays() -> tuple[str, ...]:
    """The overlays of luigi.cfg in the environment variable RECIPE, where commas separate them."""
    return tuple(filter(None, os.environ.get("RECIPE", "").split(",")))


def check_configuration() -> None:
    """Check all sections, keys and values, also those of stages that this run does not need.

    Raises SettingsError for the first unknown section or key, with the nearest known name, and for
    the first value that its key refuses.
    """
    read_overlays()
    config = configuration.get_config()
    # Compared as written: every task asks, and to interpolate every value takes longer than the rest.
    contents = {name: dict(written) for name, written in config._sections.items()}
    if contents == getattr(config, "contents_checked", None):
        return
    try:
        for name in config.sections():
            dict(config[name])
    except InterpolationError as error:  # a % or ${NAME} that means nothing
        raise SettingsError(
            f"{file_of(error.section, error.option)}: section [{error.section}] {error.option}: "
            f"{' '.join(str(error).split())}"
        ) from error
    for name, written in contents.items():
        for key, text in written.items():
            _check_comment(name, key, text)
    known = known_keys()
    values: dict[str, dict[str, dict[str, Any]]] = {}  # section -> dataset, or "" -> key -> value
    for full_name in config.sections():
        section, _, dataset = full_name.partition(":")
        if section in LUIGI_SECTIONS:
            continue
        if section not in known:
            raise SettingsError(
                f"{file_of(full_name)}: unknown section [{section}]{nearest(section, sorted([*known, *LUIGI_SECTIONS]))}"
            )
        if dataset and (problem := fault(section, dataset, known[section])):
            raise SettingsError(f"{file_of(full_name)}: section [{full_name}]: {problem}")
        for key in config[full_name]:
            name = key.replace("-", "_")
            if name not in known[section]:
                renamed = RENAMED.get((section, name))
                instead = f"; set {renamed}" if renamed else nearest(key, sorted(known[section]))
                raise SettingsError(
                    f"{file_of(full_name, key)}: section [{full_name}] has no key {key!r}{instead}"
                )
            if (parameter := known[section][name]) is not None:
                value = _parsed(full_name, key, parameter, config.get(full_name, key))
                values.setdefault(section, {}).setdefault(dataset, {})[name] = value
    for section, by_dataset in values.items():
        kind = getattr(Register.get_task_cls(section), "settings_kind", None)
        for scope, own in by_dataset.items():
            together = {**by_dataset.get("", {}), **own}
            if kind is None or not rules(kind).keys() <= together.keys():
                continue  # a missing one is told where the task is made
            try:
                settings_of(kind, together)
            except StageError as error:
                where = {"dataset": scope}
                raise SettingsError(located(str(error), where, line=False)) from error
    config.contents_checked = contents


def known_keys() -> dict[str, dict[str, Any]]:
    """Section -> key -> its parameter; None for the graph's parameters."""
    return _known_keys(tuple(Register.task_names()))


@lru_cache(maxsize=4)  # it is called for every task that is made, with the same names
def _known_keys(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    for name in names:
        task = Register.get_task_cls(name)
        if issubclass(task, Checked) and name not in ABSTRACT:
            known[name] = {
                key: None if key in GRAPH else parameter
                for key, parameter in task.get_params()
                if key not in OPERANDS
            }
    known["run"] |= dict.fromkeys(GRAPH)
    return known


class run(Checked, luigi.Config):
    """[run]: the defaults of the graph's parameters, and the folder of all artifacts."""

    ignore_unconsumed = frozenset(GRAPH)  # read by Checked for every task, not by this config

    rounds = parameter(int, Rule("rounds of propose, build, train; 1 is no refresh", at_least=1))
    artifacts = parameter(str, Rule("folder of all artifacts", significant=False))
    cpu_threads = parameter(
        int, Rule("threads of a stage's process", at_least=1, significant=False)
    )
    lock_patience = parameter(
        float,
        Rule("seconds to wait for another run that builds the same", at_least=0, significant=False),
    )
    model_resources = parameter(
        dict, Rule("luigi resources that a stage with a model takes", significant=False)
    )


def _check_comment(section: str, key: str, text: str) -> None:
    """Refuse a comment behind a value, which would become a part of it. JSON may hold its signs inside."""
    json = text.startswith(("{", "["))
    if re.search(r"[\]}]\s+[#;][^\]}]*$" if json else r"(^|\s)[#;]", text):
        raise SettingsError(
            f"{file_of(section, key)}: section [{section}] {key}: {text!r} holds a comment, which would be a "
            "part of the value; write it on a line of its own"
        )


def _parsed(section: str, key: str, parameter: Any, text: str) -> Any:
    """The parsed value of a key. Raises SettingsError when its parameter refuses the text."""
    try:
        return parameter.parse(text)
    except ValueError as error:
        named = "" if str(error).startswith(key) else f" {key}:"
        raise SettingsError(
            f"{file_of(section, key)}: section [{section}]{named} {error}"
        ) from error
