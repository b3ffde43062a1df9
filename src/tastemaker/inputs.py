"""What a stage reads: declared once, and loaded through the declaration.

`Inputs` is made anew for every stage. Each of its methods puts the fingerprint of something into the stage's manifest
and returns the one thing that loads it, so a stage cannot read what its manifest does not name. Nothing is loaded
before the stage has to work: a stage that is up to date costs its hashes.

A fingerprint is a hash of content for files and folders, and the name for what a function or a hub holds.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import torch

from tastemaker import sources
from tastemaker.artefacts import hash_path, read_json
from tastemaker.checkpoint import Reader, load_reader, load_reward_model
from tastemaker.config import to_json
from tastemaker.console import say
from tastemaker.errors import ConfigError
from tastemaker.files import read_demonstrations, read_prompts, read_rankings, read_texts
from tastemaker.functions import function_fingerprint, is_function_path, load_function
from tastemaker.guidelines import GUIDELINES
from tastemaker.kept import digest
from tastemaker.model import freeze
from tastemaker.model_places import model_source
from tastemaker.panel import Panel
from tastemaker.personal_data import without_personal_data
from tastemaker.raters import SimulatedRater
from tastemaker.recipe import Recipe, start_model
from tastemaker.records import Demonstration, Prompt, Ranking, Text
from tastemaker.scoring import FunctionScorer, ModelScorer, Scorer
from tastemaker.store.tasks import Guideline, Purpose

Loaded = TypeVar("Loaded")
Record = TypeVar("Record")
TrainingRecord = TypeVar("TrainingRecord", bound=Prompt | Demonstration | Ranking)

FOLDERS = {"sft": "3-sft", "reward": "5-reward", "policy": "6-policy"}
SCORING_BUDGET = 16384  # tokens that a reward model reads at once
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class Input(Generic[Loaded]):
    """Something that a stage reads: its fingerprint, and how it is loaded."""

    fingerprint: str
    load: Callable[[], Loaded]


@dataclass(frozen=True, slots=True)
class PersonalDataFilter:
    """Which telephone numbers count as personal data, by region; None where everything is kept."""

    phone_regions: tuple[str, ...] | None

    def kept(self, records: Sequence[TrainingRecord]) -> list[TrainingRecord]:
        """The records to train on; how many others there were is said."""
        if self.phone_regions is None:
            return list(records)
        kept, dropped = without_personal_data(records, phone_regions=self.phone_regions)
        if dropped:
            say(f"  {dropped} of {len(records)} training records hold personal data or secrets and are left out")
        return kept


@dataclass(frozen=True, slots=True)
class Raters:
    """Who answers: people, or the recipe's simulated raters."""

    recipe: Recipe
    fingerprint: str
    database: str
    """The label store, as commands name it."""

    @property
    def simulated(self) -> bool:
        return self.recipe.raters == "simulated"

    @property
    def address(self) -> str:
        """Where people answer."""
        if self.recipe.address is not None:
            return self.recipe.address
        hint = "" if self.recipe.database is None else ", with the recipe's database"
        return f"the pages of `tastemaker label serve --database {self.database}`{hint}"

    def invitation(self, group: str) -> str:
        """The command that prints a link for another person."""
        command = f"tastemaker label invite --database {self.database} --roles rater --group {group}"
        place = urlsplit(self.recipe.address or "")
        return f"{command} --origin {place.scheme}://{place.netloc}" if place.scheme and place.netloc else command

    def panel(self, group: str, *, noise: float = 0.0) -> Panel:
        """The raters of a group, training or held-out; simulated ones with that noise."""
        simulation = self.recipe.simulation
        if not self.simulated or simulation is None:
            return Panel(group=group, address=self.address, invitation=self.invitation(group))
        count = simulation.training_raters if group == "training" else simulation.held_out_raters
        profiles = load_function(simulation.raters)(group, count, self.recipe.seed)
        hooks = {
            name: None if path is None else load_function(path)
            for name, path in (("write", simulation.write), ("latent_flags", simulation.flags))
        }
        features = load_function(simulation.features)
        raters = tuple(
            SimulatedRater(replace(profile, noise=noise), self.recipe.seed, features, **hooks) for profile in profiles
        )
        return Panel(group=group, address="", simulated=raters)


class Inputs:
    """The inputs of one stage of a round whose folder is `folder`."""

    def __init__(self, recipe: Recipe, folder: Path, device: torch.device) -> None:
        self._recipe, self._folder, self._device = recipe, folder, device
        self.known: dict[str, str] = {}
        """What the stage's manifest remembers: a fingerprint by name."""

    # Settings of other sections of the recipe.

    def setting(self, name: str, value: object) -> None:
        """Something that the stage depends on and that its own config does not hold."""
        self.known[name] = value if isinstance(value, str) else json.dumps(to_json(value))

    def personal_data_filter(self) -> PersonalDataFilter:
        """Leaves out training records that hold personal data, as the intake does with prompts."""
        config = self._recipe.prompts
        self.setting("personal data", [config.filter_personal_data, config.phone_regions])
        return PersonalDataFilter(config.phone_regions if config.filter_personal_data else None)

    def seed(self) -> int:
        self.setting("seed", str(self._recipe.seed))
        return self._recipe.seed

    def raters(self) -> Raters:
        people: str | dict[str, object] = "people"
        if self._recipe.raters == "simulated" and self._recipe.simulation is not None:
            simulation = self._recipe.simulation
            people = {"simulation": to_json(simulation), "seed": self._recipe.seed}
            named = (simulation.raters, simulation.features, simulation.write, simulation.flags)
            changing = {path: function_fingerprint(path) for path in named if path is not None}
            if functions := {path: known for path, known in changing.items() if known != path}:
                people["functions"] = functions
        self.setting("people", people)
        return Raters(self._recipe, self.known["people"], self._database())

    def guideline(self, purpose: Purpose) -> Guideline:
        """What raters read beside the tasks of this stage."""
        guideline = self._recipe.guidelines.guideline(purpose)
        if guideline is not GUIDELINES[purpose]:
            self.setting("guideline", guideline.version)
        return guideline

    def _database(self) -> str:
        """The label store, as commands name it. A database's URL may hold a password, and is not repeated."""
        return "URL" if self._recipe.database is not None else shlex.quote(str(self._folder.parent / "labels.db"))

    # Files of earlier stages.

    def prompts(self, split: str) -> Input[list[Prompt]]:
        return self._records(f"1-prompts/{split}.jsonl", read_prompts)

    def demonstrations(self, split: str) -> Input[list[Demonstration]]:
        return self._records(f"2-demonstrations/{split}.jsonl", read_demonstrations)

    def rankings(self, part: str) -> Input[list[Ranking]]:
        return self._records(f"4-comparisons/{part}.jsonl", read_rankings)

    def json(self, name: str) -> Input[Any]:
        path = self._folder / name
        return self._declare(name, path, lambda: read_json(path))

    def lines(self, name: str) -> Input[list[dict[str, Any]]]:
        path = self._folder / name
        return self._declare(
            name, path, lambda: [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        )

    def epochs(self, variant: str) -> Input[Path]:
        """The folder of models that an SFT variant kept after its epochs."""
        path = self._folder / f"3-sft/{variant}/epochs"
        return self._declare("epochs", path, lambda: path)

    # Sources that the recipe names.

    def source(
        self, name: str, source: str, read: Callable[..., list[Record]], kind: type[Record]
    ) -> Input[list[Record]]:
        """Records of a source; rows of public data sets that nobody can use are left out, and said to be."""
        if is_function_path(source):
            self.seed()
        seed = self._recipe.seed
        return self._declare(
            name, sources.fingerprint(source), lambda: sources.load_reporting(source, read, kind, seed=seed)
        )

    def texts(self) -> Input[list[Text]]:
        """Pretraining text."""
        if self._recipe.text is None:
            raise ConfigError("a pretraining mix needs text; give a [text] section with 'source' and 'held_out'.")
        return self._texts("text", self._recipe.text.source, self._recipe.text.documents)

    def held_out_texts(self) -> Input[list[Text]]:
        """Pretraining text that nothing is trained on; none where the recipe has none."""
        if self._recipe.text is None:
            return Input("none", list)
        return self._texts("held-out text", self._recipe.text.held_out, self._recipe.text.held_out_documents)

    # Models.

    def model(self, name: str, *, selected: bool = True) -> Input[str]:
        """A model, as its loader wants it: "base", a variant of this run, or any source.

        A variant is "sft/NAME", "policy/NAME", "policy/NAME:ema", or "policy/NAME:40", the one kept after iteration 40
        (`keep_every`). Where the recipe selects an SFT variant's epoch, that epoch is meant if `selected`.
        """
        source = self.place_of(name, selected=selected)
        if name.partition("/")[0] in FOLDERS:
            return self._declare(str(Path(source).relative_to(self._folder)), Path(source), lambda: source)
        return self._declare(name, model_source(source), lambda: source)

    def place_of(self, name: str, *, selected: bool = True) -> str:
        """Where a model lies that is called so; this declares nothing."""
        if name.partition("/")[0] in FOLDERS:
            return str(self._variant_folder(name, selected=selected))
        return self._recipe.base.model if name == "base" else name

    def start(self, init: str, *, selected: bool) -> Input[str]:
        """What a reward model or a policy starts from: the base, or an SFT variant.

        Of one whose epoch is `selected`, a policy starts from that epoch. A reward model starts from the last, since
        reward models are what selects.
        """
        return self.model(start_model(init), selected=selected)

    def reader(self) -> Input[Reader]:
        """The base's tokenizer and its context, without its weights."""
        source = self._recipe.base.model
        place = model_source(source)
        if isinstance(place, Path) and place.is_dir():
            files = sorted(path for path in place.iterdir() if path.is_file() and path.suffix not in WEIGHTS)
            place = digest({path.name: hash_path(path) for path in files})
        return self._declare("base's tokenizer", place, lambda: load_reader(source))

    def scorer(self, name: str, *, budget: int = SCORING_BUDGET) -> Input[Scorer]:
        """A reward variant, or a Python function that scores."""
        if name not in self._recipe.reward:
            known = function_fingerprint(name)
            return self._declare(f"reward {name}", known, lambda: FunctionScorer(load_function(name), name=name))
        folder = self._variant_folder(f"reward/{name}")
        precision = self._recipe.reward[name].optimizer.precision

        def load() -> Scorer:
            model = freeze(load_reward_model(str(folder)), precision).to(self._device)
            return ModelScorer(model, budget=budget, precision=precision)

        return self._declare(str(folder.relative_to(self._folder)), folder, load)

    # How it is done.

    def _declare(self, name: str, place: Path | str, load: Callable[[], Loaded]) -> Input[Loaded]:
        if name not in self.known:
            self.known[name] = hash_path(place) if isinstance(place, Path) else place
        return Input(self.known[name], load)

    def _records(self, name: str, read: Callable[[Path], list[Record]]) -> Input[list[Record]]:
        """The records of one of our own files, which may be empty."""
        path = self._folder / name
        return self._declare(name, path, lambda: read(path) if path.stat().st_size else [])

    def _texts(self, name: str, source: str, count: int | None) -> Input[list[Text]]:
        if count is not None:
            self.setting(f"{name}, documents", count)
        declared = self.source(name, source, read_texts, Text)
        seed = self._recipe.seed
        content = declared.fingerprint
        return Input(f"{content}, {count}", lambda: _read_texts(source, seed, content)[:count])

    def _variant_folder(self, name: str, *, selected: bool = True) -> Path:
        kind, _, variant = name.partition("/")
        variant, _, which = variant.partition(":")
        if kind == "sft" and selected and variant in self._recipe.selection:
            variant = f"{variant}-selected"
        folder = self._folder / FOLDERS[kind] / variant
        if which.isdigit():
            return folder / "iterations" / f"{int(which):04d}"
        return folder / (f"model-{which}" if which else "model")


@lru_cache(maxsize=2)
def _read_texts(source: str, seed: int, fingerprint: str) -> list[Text]:
    """Documents, read once for all stages; `fingerprint` tells a file from what it held before."""
    return sources.load_reporting(source, read_texts, Text, seed=seed)


def fingerprints(inputs: Mapping[str, Input[Any]]) -> dict[str, str]:
    """What a study's name or a kept sample remembers of the inputs that shaped it."""
    return {name: one.fingerprint for name, one in inputs.items()}
