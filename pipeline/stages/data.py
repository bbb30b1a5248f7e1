"""The stages before the first round: Download, Split and BasePolicy."""

import hashlib
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import permutations
from pathlib import Path
from typing import Any

import luigi

import data_cards
from pipeline.methods import SEED_HELP
from pipeline.parameters import parameters
from pipeline.stage import LOGGER, Stage
from pipeline.stages.engine import engine
from tasks.ingest.settings import DownloadSettings, SplitSettings
from tasks.language.words import normalize
from tasks.runtime.settings import rules
from training.settings import EMBEDDED, BasePolicySettings, ModelSettings

EMBEDDED_WEIGHTS = 1  # raised when its weights are others


@parameters(DownloadSettings)
class Download(Stage):
    """Writes a data card's images, checked and decoded, to Parquet."""

    code_version = 2

    module = "tasks.download"
    reads_card = True

    @cached_property
    def settings(self) -> DownloadSettings:
        return self.read(DownloadSettings)

    def parts(self):
        return of_each_set(self)

    def place(self):
        return "download"

    def arguments(self):
        archives = self.settings.archives.expanduser().resolve()
        return {"card": self.dataset, **replace(self.settings, archives=archives).values()}


@parameters(SplitSettings)
class Split(Stage):
    """Assigns each image to pretrain, train, val or test, and each class to base or novel."""

    seed = luigi.IntParameter(description=SEED_HELP)

    code_version = 2
    module = "tasks.split"
    reads_card = True

    @cached_property
    def settings(self) -> SplitSettings:
        """[Split] with the cap of this set only, so that other sets' caps leave it unchanged."""
        settings = self.read(SplitSettings)
        for name in set(settings.train_caps) - {"*"}:
            if not data_cards.exists(name):
                raise self.refusal(f"[Split] train_caps: there is no data card {name!r}")
        return replace(settings, train_caps={self.dataset: settings.cap(self.dataset)})

    def parts(self):
        return of_each_set(self)

    def significant(self):
        significant = super().significant()
        del significant["train_caps"]
        return {**significant, "max_train_images": self.settings.cap(self.dataset)}

    def needs(self):
        return {"download": Download(dataset=self.dataset)}

    def extra_identity(self):
        if not self.settings.split_file:
            return {}
        from tasks.ingest.split_files import sources

        files = sources(Path(self.settings.split_file).expanduser())
        contents = b"".join(path.read_bytes() for path in files)
        return {"split_file_sha256": hashlib.sha256(contents).hexdigest()}

    def place(self):
        return "split"

    def arguments(self):
        own = {"card": self.dataset, "seed": self.seed}
        return {**own, **self.settings.values(), **paths(self)}


@parameters(BasePolicySettings)
class BasePolicy(Stage):
    """The policy that training starts from: the embedded miniature, a folder or a hub id.

    A published model that is not taught depends on no images. So all datasets and seeds share one
    artifact, which lies beside their folders.
    """

    seed = luigi.IntParameter(description=SEED_HELP)

    has_model = True

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        if not self.of_a_set:  # one task for all sets and seeds, or they would wait for one another
            self.task_id = f"{self.task_family}_{self.fingerprint}"

    @cached_property
    def settings(self) -> BasePolicySettings:
        return self.read(BasePolicySettings)

    @property
    def module(self):  # type: ignore[override]
        """`training.sft` teaches a model on a set; `training.adopt` takes a published one over."""
        return "training.sft" if self.of_a_set else "training.adopt"

    @property
    def of_a_set(self) -> bool:
        """Whether it is taught on the images of a dataset; the embedded policy knows the beetles."""
        model, steps = self.settings.model, self.settings.steps
        if model == EMBEDDED:
            return steps > 0 and not all(_sets_nothing_aside(name) for name in self.names)
        return model == "tiny" or steps > 0

    def significant(self):
        significant = super().significant()
        if self.of_a_set:
            return significant
        return {name: significant[name] for name in rules(ModelSettings)}

    def needs(self):
        if not self.of_a_set:
            return {}
        return {
            f"{key}/{name}": stage for name in self.names for key, stage in data(self, name).items()
        }

    def extra_identity(self):
        style = {"prompt_style": engine().settings.prompt_style} if self.of_a_set else {}
        embedded = self.settings.model == EMBEDDED
        return {**style, **({"weights": EMBEDDED_WEIGHTS} if embedded else {})}

    def place(self):
        return "base_policy"

    def arguments(self):
        if not self.of_a_set:
            return ModelSettings.of(self.settings.values()).values()
        need = self.needs()
        return {
            "card": "+".join(self.names),
            "download": [str(need[f"download/{name}"].folder) for name in self.names],
            "split": [str(need[f"split/{name}"].folder) for name in self.names],
            "prompt_style": engine().settings.prompt_style,
            "seed": self.seed,
            **self.settings.values(),
        }


def _sets_nothing_aside(name: str) -> bool:
    """Whether a drawn set has no images to be pretrained on; other sets may have, by [Split]."""
    if not data_cards.exists(name):  # said elsewhere
        return False
    source = data_cards.load(name).source
    return source["kind"] == "drawn" and not source["images_per_class"].get("pretrain")


def data(stage: Any, name: str) -> dict[str, Stage]:
    """The Download and the Split of a set."""
    return {
        "download": Download(dataset=name),
        "split": Split(dataset=name, seed=stage.seed),
    }


def of_each_set(stage: Stage) -> list[Stage]:
    """The same stage for each set of a mix; empty when its dataset is no mix."""
    return [stage.for_set(dataset=name) for name in stage.names] if len(stage.names) > 1 else []


@lru_cache(maxsize=16)  # every stage that is made may ask; it is told once
def tell_of_trained_novel_classes(protocols: tuple[tuple[str, str], ...]) -> None:
    """Warn of each pair of a mix's sets where a class is base in one set and novel in the other.

    Training sees images of it from the first set, so the second's novel accuracy is not of new classes.
    `protocols` holds each set's name with the protocol that divides its classes.
    """
    from tasks.tables.split_table import base_count  # it imports pyarrow

    spellings: dict[tuple[str, str], dict[str, str]] = {}  # (set, group) -> normalised -> class
    for name, protocol in protocols:
        card = data_cards.load(name)
        num_base = base_count(len(card.classes), protocol)
        for label, own in enumerate(card.classes):
            group = spellings.setdefault((name, "base" if label < num_base else "novel"), {})
            group |= {normalize(text): own for text in (own, *card.aliases.get(own, ()))}
    names = [name for name, _ in protocols]
    for trained, tested in permutations(names, 2):
        base = spellings[trained, "base"]
        novel = spellings.get((tested, "novel"), {})
        if shared := sorted({own for key, own in novel.items() if key and key in base}):
            LOGGER.warning(
                "mix %s: training sees %d of the novel classes of %s, as base classes of %s (%s), so the novel "
                "accuracy of %s is not of new classes alone",
                "+".join(names),
                len(shared),
                tested,
                trained,
                ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else ""),
                tested,
            )


def paths(stage: Stage) -> dict[str, str]:
    """The artifact folders that a stage reads, by the names of its function's arguments."""
    return {name: str(needed.folder) for name, needed in stage.needed.items()}


def snake(name: str) -> str:
    """BuildMCQ -> build_mcq."""
    return {"BuildMCQ": "build_mcq"}.get(name, name.lower())
