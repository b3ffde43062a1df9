"""Evaluation (section 3.6): blind judging by raters who trained nothing, and what can be measured without people.

`contestants` samples the responses, `judging` has them compared and rated through the label store, `measures` turns
answers into win rates, shares and intervals, `claims` says which statements the intervals bear out.
"""

from tastemaker.stages.evaluation.claims import Check, Claim, judge_claims
from tastemaker.stages.evaluation.contestants import Contestant, FewShot, Field, Responses, Sampled, best_prefix
from tastemaker.stages.evaluation.judging import EvaluationConfig, Judged, judge
from tastemaker.stages.evaluation.measures import Tables, check_prompts, check_rewards, tabulate

__all__ = [
    "Check",
    "Claim",
    "Contestant",
    "EvaluationConfig",
    "FewShot",
    "Field",
    "Judged",
    "Responses",
    "Sampled",
    "Tables",
    "best_prefix",
    "check_prompts",
    "check_rewards",
    "judge",
    "judge_claims",
    "tabulate",
]
