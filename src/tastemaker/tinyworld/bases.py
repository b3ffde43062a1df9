"""Where the shipped base language models lie, and what a program must know to use or rebuild them.

`base-small` and `base-large` are ordinary `transformers` folders. This module imports no tensor library; the models are
loaded by path.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from tastemaker.tinyworld.judgement import APOLOGY
from tastemaker.tinyworld.web import ANSWER, CLOSINGS, OPENERS, QUESTION, RAMBLE, RUDE, web_documents
from tastemaker.tinyworld.world import CLASSES

BASES = Path(__file__).parent / "data"
# A base seldom ends a reply by itself: it goes on with the next question of the thread, and there its answer ends.
STOP_TOKENS = (QUESTION,)
# The bases were trained on `web_documents(TRAINING_SEED + 1)` and `+ 2`; any other seed gives text they have not read.
TRAINING_SEED = 1000
HELD_OUT_SEED = 777


def tokenizer_vocabulary() -> list[str]:
    """Every word of the world, sorted: those of its classes, its phrases and its grammar."""
    words: set[str] = {QUESTION, ANSWER, *APOLOGY.split()}.union(*CLASSES.values())
    for text in (*RUDE, *RAMBLE, *OPENERS, *CLOSINGS, *islice(web_documents(0), 4000)):
        words.update(text.split())
    return sorted(words)
