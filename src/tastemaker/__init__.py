"""Tastemaker: teaching language models by human preference (InstructGPT, arXiv 2203.02155).

Read `pipeline.py` first: the paper as seven calls. `losses.py` holds its equations. `docs/architecture.md` draws the
layers. Importing this package imports neither torch nor anything of the web.
"""

__version__ = "0.1.0"
