"""The one base class of all stages: fingerprint, artifact folder, completeness, run.

A stage's fingerprint covers its name, its `code_version`, its significant settings and the
fingerprints of what it requires, so a changed setting makes a new artifact and a setting changed
back finds the old one.
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

import data_cards
from pipeline.artifacts import source_code, store
from pipeline.artifacts.child import LOG
from pipeline.parameters import plain
from pipeline.settings import Checked, SettingsError, run

# Recorded in the manifest, but not hashed: what they change shows in the inputs or extra_identity.
GRAPH_ONLY = ("dataset", "subset", "method", "refresh_round")


class Stage(Checked, luigi.Task):
    """A Luigi task whose work is one function in a child process and whose output is one artifact.

    A subclass declares its parameters, `needs()` and `arguments()`; `code_version` is raised
    whenever its output would change for the same settings.
    """

    dataset = luigi.Parameter(description="a data card's name, or several joined by +")

    code_version = 1
    module = ""
    reads_card = False  # the card's content shapes this artifact beyond what its inputs carry
    has_model = False  # it takes [run] model_resources while it runs

    def needs(self) -> dict[str, "Stage"]:
        """What this stage reads, by the name its function knows it by."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """The stage function's keyword arguments, without `output`."""
        raise NotImplementedError

    def place(self) -> str:
        """The folder of this stage's artifacts below `artifacts/<dataset>/`, or `artifacts/`."""
        raise NotImplementedError

    @property
    def of_a_set(self) -> bool:
        """Whether its artifact is a dataset's; others lie beside the datasets' folders."""
        return True

    def extra_identity(self) -> dict[str, Any]:
        """Whatever else shapes the result, for stages that share settings."""
        return {}

    def parts(self) -> list["Stage"]:
        """A stage that works on one set at a time, asked for a mix: the same stage of each set."""
        return []

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
        with contextlib.suppress(OSError):  # a read-only root can still be read
            store.sweep(self.folder)
            # A setting changed back leads back, too. Luigi asks nothing above a complete stage, so
            # this one also answers for what it rests on.
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
        if self.parts() or self.complete():  # another task of the same identity made it meanwhile
            return
        manifest = {**self.identity, "fingerprint": self.fingerprint}
        manifest["sources"] = source_code.digests(self.module)
        if self.of_a_set:
            manifest |= {name: getattr(self, name) for name in GRAPH_ONLY if hasattr(self, name)}
        environment = {"OMP_NUM_THREADS": str(run().cpu_threads)}
        for name in ("VLLM_LOGGING_LEVEL", "TRANSFORMERS_VERBOSITY"):  # read when they are imported
            environment[name] = os.environ.get(name, "ERROR" if "VLLM" in name else "error")
        working = store.partial_of(self.folder)
        self._tell("set_tracking_url", (working / LOG).as_uri())
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
        self._tell("set_tracking_url", self.folder.as_uri())

    @property
    def resources(self) -> dict[str, int]:
        """What the scheduler counts, so that two stages do not share a device unasked."""
        return {key: int(n) for key, n in run().model_resources.items()} if self.has_model else {}

    def _show_progress(self, message: str, percent: int | None) -> None:
        """On the scheduler's page."""
        self._tell("set_status_message", message)
        if percent is not None:
            self._tell("set_progress_percentage", percent)

    def _tell(self, name: str, value: Any) -> None:
        tell = getattr(self, name, None)  # there while a worker runs this task
        if tell is not None:
            with contextlib.suppress(Exception):  # a page is no reason to stop
                tell(value)

    def significant(self) -> dict[str, Any]:
        """Significant parameters, as plain JSON values; graph parameters other than seed left out."""
        chosen = {}
        for name, parameter in self.get_params():
            if parameter.significant and name not in GRAPH_ONLY:
                chosen[name] = plain(getattr(self, name))
        return chosen

    @cached_property
    def needed(self) -> dict[str, "Stage"]:
        """What `needs` says, asked once: of a large graph it is the slow part."""
        return self.needs()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything the fingerprint is made of."""
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
        """sha256 of the identity, shortened to 16 hex digits."""
        canonical = json.dumps(self.identity, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @cached_property
    def folder(self) -> Path:
        """Where this stage's artifact lies, or will lie."""
        root = Path(run().artifacts).resolve()
        of_set = root / "+".join(self.names) if self.of_a_set else root
        return of_set / self.place() / self.fingerprint

    @cached_property
    def names(self) -> list[str]:
        """The data cards' names; more than one is a mix."""
        try:
            return data_cards.names_in(self.dataset)
        except data_cards.CardError as error:
            raise SettingsError(str(error)) from error

    @cached_property
    def card(self) -> data_cards.Card:
        """The data card.

        Raises SettingsError with the card's own complaint.
        """
        try:
            return data_cards.load(self.dataset)
        except data_cards.CardError as error:
            raise SettingsError(str(error)) from error


def lineage(stage: Stage) -> list[Stage]:
    """Every stage that `stage` rests on, each once, inputs before what reads them."""
    found: dict[str, Stage] = {}

    def visit(current: Stage) -> None:
        for needed in current.needed.values():
            if needed.task_id not in found:
                visit(needed)
                found[needed.task_id] = needed

    visit(stage)
    return list(found.values())


class OfSet(Stage):
    """A stage that works on one set. In a mix, `dataset` is the mix and `subset` that one set."""

    subset = luigi.Parameter(description="one set of a mix; empty: the dataset itself")

    @property
    def set_name(self) -> str:
        """The card that this stage works on."""
        names = self.names
        if self.subset and self.subset not in names:
            raise SettingsError(f"subset {self.subset!r} is not in dataset {self.dataset!r}")
        return self.subset or self.dataset

    def parts(self) -> list[Stage]:
        mixed = len(self.names) > 1 and not self.subset
        return [self.clone(subset=name) for name in self.names] if mixed else []


class _OneSentence(logging.Filter):
    """A stage's failure is told in its own sentence; a traceback is kept for bugs."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, store.StageFailed):
            record.msg, record.args, record.exc_info = "%s", (str(error),), None
        return True


LOGGER = logging.getLogger("luigi-interface")
LOGGER.addFilter(_OneSentence())
