"""The comparisons of a round: sample candidates or take ready rankings, have them ranked, measure agreement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tastemaker import agreement
from tastemaker.console import say
from tastemaker.errors import DataError
from tastemaker.files import read_rankings, write_json, write_records
from tastemaker.halves import first_turn
from tastemaker.inputs import Inputs, Raters, fingerprints
from tastemaker.kept import Kept, digest
from tastemaker.raters import calibrate_noise, noiseless_utilities
from tastemaker.records import Prompt, Ranking, messages_hash
from tastemaker.stages.comparisons import (
    Candidates,
    ComparisonsConfig,
    collect_rankings,
    kept_candidates,
    sample_candidates,
)
from tastemaker.stages.prompts import say_shortfall

if TYPE_CHECKING:
    from tastemaker.round import Round, Work

CALIBRATION_PROMPTS = 300  # on which the simulated raters' noise is set
CANDIDATES = "candidates.jsonl"


def compare(round_: Round) -> None:
    """Run the stage `4-comparisons`."""
    config, inputs = round_.recipe.comparisons, round_.inputs()
    assert config is not None
    work = _collect(round_, config, inputs) if config.source is None else _sort(config.source, inputs)
    round_.run("4-comparisons", config, inputs, work, keep=CANDIDATES)


def _sort(source: str, inputs: Inputs) -> Work:
    """Rankings that exist already go where their first turn went: training, validation, test (measured on only).

    By the first turn, because a conversation that shares it with a test prompt must not be trained on.
    """
    given = inputs.source("source", source, read_rankings, Ranking)
    splits = {split: inputs.prompts(split) for split in ("train", "validation", "test")}
    personal_data = inputs.personal_data_filter()

    def work(folder: Path) -> None:
        split_of = {
            messages_hash(first_turn(prompt).messages): split
            for split, asked in splits.items()
            for prompt in asked.load()
        }
        rows = given.load()
        placed = [(split_of.get(messages_hash(first_turn(row.prompt).messages)), row) for row in rows]
        unplaced = sum(split is None for split, _ in placed)
        if unplaced == len(rows):
            raise DataError(
                f"none of its {len(rows)} rankings begins with a prompt of the intake (1-prompts), so nobody could say "
                "which of them may be trained on; give the rankings' own prompts as the source of [prompts].",
                path=source,
            )
        sorted_rows = {split: [row for where, row in placed if where == split] for split in splits}
        sorted_rows["train"] = personal_data.kept(sorted_rows["train"])
        for split, kept in sorted_rows.items():
            write_records(folder / f"{split}.jsonl", kept)
        write_records(folder / "held-out.jsonl", [])
        say("  " + ", ".join(f"{len(kept)} {split}" for split, kept in sorted_rows.items()))
        if unplaced:
            say(f"  {unplaced} of {len(rows)} rankings are left out: they begin with no prompt of the intake")

    return work


def _collect(round_: Round, config: ComparisonsConfig, inputs: Inputs) -> Work:
    models = {name: inputs.model(name, selected=False) for name in config.sources}
    asked = {split: inputs.prompts(split) for split in ("train", "validation")}
    raters, guideline, seed = inputs.raters(), inputs.guideline("training"), inputs.seed()
    shape = config.shape() | {"models": fingerprints(models), "seed": seed}

    def draw(prompts: Sequence[Prompt]) -> list[Candidates]:
        policies = {name: round_.load_model(model.load()) for name, model in models.items()}
        return sample_candidates(policies, prompts, config, seed=seed)

    def work(folder: Path) -> None:
        kept, drawn = Kept(folder / CANDIDATES), {}
        for split, count in (("train", config.train), ("validation", config.validation)):
            say_shortfall(asked[split].load(), count, f"{split} prompts")
            drawn[split] = kept_candidates(kept, asked[split].load()[:count], draw, depends=digest(shape))
        noise = _noise(round_, raters, drawn["train"])
        collected = {}
        for name, split, group, overlap in (
            ("train", "train", "training", config.overlap),
            ("validation", "validation", "training", config.validation_overlap),
            ("held-out", "validation", "held-out", config.validation_overlap),
        ):
            question = shape | {"prompts": asked[split].fingerprint, "overlap": overlap, "noise": noise}
            question |= {"people": raters.fingerprint, "guideline": guideline.version}
            collected[name] = collect_rankings(
                round_.service,
                drawn[split],
                raters.panel(group, noise=noise),
                study=round_.study(f"comparisons/{name}", question),
                guideline=guideline,
                overlap=overlap,
            )
            write_records(folder / f"{name}.jsonl", collected[name])
        found: dict[str, Any] = {"noise": noise if raters.simulated else None}
        found |= _agreement(collected["validation"], collected["held-out"])
        write_json(folder / "raters.json", found)

    return work


def _noise(round_: Round, raters: Raters, drawn: list[Candidates]) -> float:
    """The noise at which simulated training raters agree as often as the recipe says."""
    simulation = round_.recipe.simulation
    if not raters.simulated or simulation is None:
        return 0.0
    panel = raters.panel("training")
    chosen = [(candidates.prompt, candidates.responses) for candidates in drawn[:CALIBRATION_PROMPTS]]
    lapse = panel.simulated[0].profile.lapse
    return calibrate_noise(noiseless_utilities(panel.simulated, chosen), target=simulation.agreement, lapse=lapse)


def _agreement(training: list[Ranking], held_out: list[Ranking]) -> dict[str, Any]:
    """Each group with itself, and the training raters with the held-out raters, on the same responses."""
    names = {ranking.author.rater for ranking in training if ranking.author.rater is not None}
    both = agreement.pairwise_answers([*training, *held_out])
    return {
        "training": agreement.agreement_within(agreement.pairwise_answers(training)).to_json(),
        "held_out": agreement.agreement_within(agreement.pairwise_answers(held_out)).to_json(),
        "training_against_held_out": agreement.agreement_between(both, names).to_json(),
    }
