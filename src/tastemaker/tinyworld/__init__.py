"""A small synthetic world in which every claim of the paper can be measured, because the truth is known.

It has facts, a web to pretrain on, users with requests, people who demonstrate and rate, and two base language models
trained on its web (`BASES`). See docs/tinyworld.md. Nothing in training, labelling or evaluation knows of it.
"""

from tastemaker.tinyworld.bases import BASES, HELD_OUT_SEED, STOP_TOKENS, TRAINING_SEED, tokenizer_vocabulary
from tastemaker.tinyworld.judgement import GOLD_WEIGHTS, features, gold_utility, likert_and_flags, utility
from tastemaker.tinyworld.people import demonstration, rater_weights
from tastemaker.tinyworld.prompts import few_shot_examples, prompt_text, prompts
from tastemaker.tinyworld.web import copying_drills, web_documents

__all__ = [
    "BASES",
    "GOLD_WEIGHTS",
    "HELD_OUT_SEED",
    "STOP_TOKENS",
    "TRAINING_SEED",
    "copying_drills",
    "demonstration",
    "features",
    "few_shot_examples",
    "gold_utility",
    "likert_and_flags",
    "prompt_text",
    "prompts",
    "rater_weights",
    "tokenizer_vocabulary",
    "utility",
    "web_documents",
]
