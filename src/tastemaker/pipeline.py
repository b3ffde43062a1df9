"""The paper as seven stages. Read this first.

    prompts -> demonstrations -> sft -> comparisons -> reward -> policy -> evaluation

Each stage has a folder of its own under `OUT/round-1`; a stage whose inputs have not changed is skipped, an
interrupted one continues. `round.py` says which files go from one stage into the next; the stages themselves are in
`stages/`, one file a chapter, and the equations in `losses.py`.
"""

from __future__ import annotations

from pathlib import Path

from tastemaker import preflight
from tastemaker.config import to_json
from tastemaker.console import say
from tastemaker.evaluation_sampling import check_text_losses
from tastemaker.files import write_json
from tastemaker.recipe import Recipe
from tastemaker.report import write_report
from tastemaker.round import Round


def run(recipe: Recipe, out: Path, *, max_memory: int | None = None) -> Path:
    """Run a recipe into the folder `out`, training within so many bytes of memory. Returns the path of the report.

    Raises:
        AnswersMissing: people have to answer queued tasks first; run again afterwards.
        ConfigError, DataError, ModelError: what the recipe names is not there, or does not go together.
    """
    preflight.check(recipe)
    if recipe.evaluation is not None:
        check_text_losses(recipe.evaluation, recipe.base.model)
    with Round(recipe, out, max_memory=max_memory) as round_:
        round_.prompts()
        if not (out / "results.json").exists():  # which are of the recipe beside them
            write_json(out / "recipe.json", to_json(recipe))
        round_.demonstrations()
        for variant in recipe.sft:
            round_.sft(variant)
        if recipe.comparisons is not None:
            round_.comparisons()
        for variant in recipe.reward:
            round_.reward(variant)
        for variant in recipe.selection:
            round_.select(variant)
        for variant in recipe.policy:
            round_.policy(variant)
        if recipe.evaluation is not None:
            round_.evaluation()
        results = round_.results()
    write_json(out / "recipe.json", to_json(recipe))
    write_json(out / "results.json", results)
    report = write_report(out)
    for claim in results["claims"]:
        say(f"  claim {claim['id']:>2} {'holds' if claim['holds'] else 'does NOT hold'}: {claim['statement']}")
    say(f"report: {report}")
    return report
