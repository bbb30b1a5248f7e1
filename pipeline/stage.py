"""The base class of all stages: computes a stage's fingerprint, finds its artifact, or makes it.

A stage's fingerprint covers its name, its `code_version`, its significant settings and the
fingerprints of its inputs. So a changed setting makes a new artifact, and a setting that is changed
back finds the old one again.
"""

import contextlib
import hashlib
import json
import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import luigi
from luigi.cmdline_parser import CmdlineParser

import data_cards
from pipeline.artifacts import source_code, store
from pipeline.artifacts.child import LOG
from pipeline.parameters import is_unset
from pipeline.scopes import own_settings
from pipeline.settings import Checked, SettingsError, run
from tasks.runtime.protocol import METHOD_NAMES
from tasks.runtime.settings import plain

# In the manifest, but not in the fingerprint: their effect shows in the inputs or extra_identity.
GRAPH_ONLY = ("dataset", "subset", "method", "refresh_round")


class Stage(Checked, luigi.Task):
    """A Luigi task that runs one function in a child process and leaves one artifact.

    A subclass declares its parameters, `needs()` and `arguments()`. Raise its `code_version` whenever
    its output changes for the same settings.
    """

    dataset = luigi.Parameter(description="a data card's name, or several joined by +")

    code_version = 1
    module = ""
    reads_card = False  # whether the card's contents belong to the fingerprint
    has_model = False  # whether it takes [run] model_resources while it runs

    def needs(self) -> dict[str, "Stage"]:
        """The stages whose artifacts this one reads, by the names of the function's arguments."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """The stage function's keyword arguments, without `output`."""
        raise NotImplementedError

    def place(self) -> str:
        """The folder of this stage's artifacts below `artifacts/<dataset>/`, or `artifacts/`."""
        raise NotImplementedError

    @property
    def of_a_set(self) -> bool:
        """Whether its artifact lies in a dataset's folder; others lie beside these folders."""
        return True

    def extra_identity(self) -> dict[str, Any]:
        """Values outside the stage's own settings that belong to its fingerprint."""
        return {}

    def parts(self) -> list["Stage"]:
        """The same stage for each set of a mix, where a stage handles one set; else empty."""
        return []

    def for_set(self, **changed: str) -> "Stage":
        """The same stage for one set of a mix, with that set's settings: `changed` names the set.

        What the command line gives the stage that is run (`--part val`) holds for every set.
        """
        line = CmdlineParser.get_instance()
        options = vars(line.known_args) if line else {}
        is_run = options.get("root_task") == self.task_family
        own = own_settings(self.task_family, self.get_params(), {**self.param_kwargs, **changed})
        kept = {name: value for name, value in own.items() if not (is_run and options.get(name))}
        return self.clone(**kept, **changed)

    def requires(self) -> list["Stage"]:
        return self.parts() or list(self.needed.values())

    def output(self) -> list[luigi.LocalTarget]:
        stages = self.parts() or [self]
        return [luigi.LocalTarget(str(stage.folder / store.MANIFEST)) for stage in stages]

    def complete(self) -> bool:
        if parts := self.parts():
            return all(stage.complete() for stage in parts)
        if not self.folder.is_dir():
            return False
        with contextlib.suppress(OSError):  # the folder may be read-only
            store.sweep(self.folder)
            # Point `current` at this artifact again, for settings that were changed back. Luigi
            # does not visit the inputs of a complete stage, so their links are set here as well.
            for folder in {stage.folder for stage in [self, *lineage(self)]}:
                if folder.is_dir():
                    store.point_at(folder)
        if changed := source_code.changed(store.manifest_of(self.folder), self.module):
            LOGGER.warning(
                "%s: %s; raise it if the change affects results",
                self.task_family,
                source_code.change_note(changed),
            )
        return True

    def run(self) -> None:
        if self.parts() or self.complete():  # another task with this fingerprint has made it
            return
        manifest = {**self.identity, "fingerprint": self.fingerprint}
        manifest["sources"] = source_code.digests(self.module)
        if self.of_a_set:
            manifest |= {name: getattr(self, name) for name in GRAPH_ONLY if hasattr(self, name)}
        environment = {"OMP_NUM_THREADS": str(run().cpu_threads)}
        for name in ("VLLM_LOGGING_LEVEL", "TRANSFORMERS_VERBOSITY"):  # read at import
            environment[name] = os.environ.get(name, "ERROR" if "VLLM" in name else "error")
        working = store.partial_of(self.folder)
        self._call_luigi("set_tracking_url", (working / LOG).as_uri())
        store.build(
            self.folder,
            self.module,
            self.arguments(),
            manifest,
            environment,
            launcher=getattr(self, "launcher", ""),
            patience=run().lock_patience,
            on_progress=self._show_progress,
        )
        self._call_luigi("set_tracking_url", self.folder.as_uri())

    @property
    def resources(self) -> dict[str, int]:
        """The scheduler's resources that it takes, so that two stages do not share a GPU unasked."""
        return {key: int(n) for key, n in run().model_resources.items()} if self.has_model else {}

    def _show_progress(self, message: str, percent: int | None) -> None:
        """Show the progress on the scheduler's page."""
        self._call_luigi("set_status_message", message)
        if percent is not None:
            self._call_luigi("set_progress_percentage", percent)

    def _call_luigi(self, name: str, value: Any) -> None:
        function = getattr(self, name, None)  # set only while a worker runs this task
        if function is not None:
            with contextlib.suppress(Exception):  # a page that cannot be updated stops no stage
                function(value)

    def significant(self) -> dict[str, Any]:
        """The settings in the fingerprint, as JSON values: significant and set, without GRAPH_ONLY."""
        return {
            name: plain(value)
            for name, parameter in self.get_params()
            if parameter.significant and name not in GRAPH_ONLY
            if not is_unset(value := getattr(self, name), parameter)
        }

    @cached_property
    def needed(self) -> dict[str, "Stage"]:
        """The result of `needs()`, cached, since it is slow in a large graph."""
        return self.needs()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All values that the fingerprint is computed from."""
        identity = {
            "stage": self.task_family,
            "code_version": self.code_version,
            "settings": {**self.significant(), **self.extra_identity()},
            "inputs": {name: stage.fingerprint for name, stage in self.needed.items()},
        }
        if self.reads_card:
            identity["card_sha256"] = self.card.sha256
        return identity

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the identity, shortened to 16 hex digits."""
        canonical = json.dumps(self.identity, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @cached_property
    def folder(self) -> Path:
        """The folder of this stage's artifact, whether it is there already or not."""
        root = Path(run().artifacts).resolve()
        of_set = root / "+".join(self.names) if self.of_a_set else root
        return of_set / self.place() / self.fingerprint

    @cached_property
    def names(self) -> list[str]:
        """The data cards' names; more than one is a mix. Raises SettingsError for a method's name."""
        try:
            names = data_cards.names_in(self.dataset)
        except data_cards.CardError as error:
            raise SettingsError(str(error)) from error
        if clash := [name for name in names if name in METHOD_NAMES]:
            raise SettingsError(
                f"dataset {clash[0]!r} is also a method, so that [Train:{clash[0]}] would mean both; "
                f"rename the data card {clash[0]}.md"
            )
        return names

    @cached_property
    def card(self) -> data_cards.Card:
        """The data card. Raises SettingsError when there is none, or it is not valid."""
        try:
            return data_cards.load("+".join(self.names))
        except data_cards.CardError as error:
            raise SettingsError(str(error)) from error


def lineage(stage: Stage) -> list[Stage]:
    """All direct and indirect inputs of `stage`, each once, inputs before the stages that read them."""
    inputs: dict[str, Stage] = {}

    def visit(current: Stage) -> None:
        for needed in current.needed.values():
            if needed.task_id not in inputs:
                visit(needed)
                inputs[needed.task_id] = needed

    visit(stage)
    return list(inputs.values())


class OfSet(Stage):
    """A stage that works on one set. In a mix, `dataset` names the mix and `subset` the set."""

    subset = luigi.Parameter(description="one set of a mix; empty: the dataset itself")

    @property
    def set_name(self) -> str:
        """The name of the data card that this stage works on."""
        names = self.names
        if self.subset and self.subset not in names:
            raise SettingsError(f"subset {self.subset!r} is not in dataset {self.dataset!r}")
        return self.subset or self.dataset

    def parts(self) -> list[Stage]:
        mixed = len(self.names) > 1 and not self.subset
        return [self.for_set(subset=name) for name in self.names] if mixed else []


class _OneSentence(logging.Filter):
    """Logs the failure of a stage as one sentence. Bugs keep their traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, store.StageFailed):
            record.msg, record.args, record.exc_info = "%s", (str(error),), None
        return True


LOGGER = logging.getLogger("luigi-interface")
LOGGER.addFilter(_OneSentence())
