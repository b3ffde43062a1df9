"""Text that is always at hand: the Python language reference, which every Python installation carries (PSF licence).

A source of pretraining text for runs without a corpus of their own: `tastemaker.library_text:training` and `:held_out`.
"""

from __future__ import annotations

from pydoc_data.topics import topics

from tastemaker.records import About, Text

HELD_OUT_EVERY = 10  # every tenth topic is held out


def training(seed: int) -> list[Text]:
    """The topics to train on, cut into paragraphs' worth of text; the same for every seed."""
    del seed
    return _texts(held_out=False)


def held_out(seed: int) -> list[Text]:
    """The topics that are never trained on; some texts stand under two names, and one of them may be."""
    del seed
    trained = {one.text for one in _texts(held_out=False)}
    return [one for one in _texts(held_out=True) if one.text not in trained]


def _texts(*, held_out: bool) -> list[Text]:
    names = sorted(topics)
    chosen = [name for place, name in enumerate(names) if (place % HELD_OUT_EVERY == 0) == held_out]
    return [Text(text=topics[name].strip(), about=About(id=f"python-{name}")) for name in chosen]
