"""Text that models and people wrote, as markup that can neither run nor hide anything.

Two modes. `raw` shows the characters as they are, line breaks included. `markdown` renders CommonMark with tables, in
three steps that each would suffice against scripts: HTML in the text is shown, not taken (`html` off), what comes out
passes an allow-list of tags and attributes (`nh3`), and the page's content security policy runs nothing inline. No
images: fetching one would tell its host who is reading. A link says where it goes.

In both modes, characters that cannot be seen are shown as marks such as U+202E: direction overrides and zero-width
characters can hide text, turn it round, or let a model mark its responses. What writing systems need is left alone:
joiners between letters of scripts that join, and inside emoji.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import MutableMapping, Sequence
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from markupsafe import Markup, escape

# Scripts that use joiners as letters do; a character's Unicode name begins with its script's.
_JOINING = frozenset(
    "ARABIC SYRIAC MANDAIC MONGOLIAN DEVANAGARI BENGALI GURMUKHI GUJARATI ORIYA TAMIL TELUGU KANNADA MALAYALAM SINHALA "
    "KHMER MYANMAR TIBETAN".split()
)
# Blank though they are no format characters: combining grapheme joiner, Hangul and Braille fillers, Khmer vowels,
# noncharacters, and what Unicode keeps free for invisible ones. Other characters that are too new to be known to this
# Python are visible ones, as a rule emoji.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u2065\u2800\u3164\uffa0\ufff0-\ufff8\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e0fff]"
)
# Deeper than this, the parser would leave out text; such text is shown raw.
_DEEPEST = 30
_LONGEST_MARKDOWN = (
    50_000  # characters; hostile text of that length takes two seconds to parse, longer text is shown raw
)
_SHOWN_AT_ONCE = 3  # of a run of invisible characters; the rest is counted

_TAGS = frozenset(
    "p br hr strong em s code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 table thead tbody tr th td a span".split()
)
_ATTRIBUTES = {"*": set[str](), "a": {"href"}, "ol": {"start"}}
_CLASSES = {"span": {"mark", "address"}}
_SCHEMES = {"http", "https", "mailto"}


def raw(text: str) -> Markup:
    """The text as it is, every character visible."""
    return Markup('<div class="text raw" dir="auto">{}</div>').format(visible(text))


def markdown(text: str) -> Markup:
    """The text rendered as Markdown, every character visible."""
    if len(text) > _LONGEST_MARKDOWN:
        return raw(text)
    tokens = _MARKDOWN.parse(_without_surrogates(text))
    if any(token.level >= _DEEPEST - 1 for token in tokens):
        return raw(text)
    rendered = _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})
    clean = nh3.clean(
        rendered,
        tags=set(_TAGS),
        attributes=_ATTRIBUTES,
        allowed_classes=_CLASSES,
        url_schemes=_SCHEMES,
        url_relative="deny",  # nor into our own pages
        link_rel="noopener noreferrer nofollow",
    )
    return Markup('<div class="text markdown" dir="auto">{}</div>').format(Markup(clean))


def visible(text: str) -> Markup:
    """The text, escaped, with marks in place of characters that cannot be seen; for one line such as a name too."""
    pieces: list[Markup] = []
    place = 0
    while place < len(text):
        end = place
        while end < len(text) and _is_invisible(text, end):
            end += 1
        if end > place:
            pieces.append(_marks(text[place:end]))
            place = end
        while end < len(text) and not _is_invisible(text, end):
            end += 1
        pieces.append(escape(text[place:end]))
        place = end
    return Markup("").join(pieces)


def _marks(run: str) -> Markup:
    shown = " ".join(f"U+{ord(character):04X}" for character in run[:_SHOWN_AT_ONCE])
    more = len(run) - _SHOWN_AT_ONCE
    return Markup('<span class="mark">{}</span>').format(shown if more <= 0 else f"{shown} and {more} more")


def _is_invisible(text: str, place: int) -> bool:
    character = text[place]
    if character < "\x7f":
        return character < " " and character not in "\n\t\r"
    if character in "\u200c\u200d":
        return not _joins(text, place)
    if "\ufe00" <= character <= "\ufe0f":  # chooses how the character before it is drawn
        return place == 0 or unicodedata.category(text[place - 1]) not in ("So", "Sm", "Po", "Nd", "Sk", "Lo")
    # Formats, controls, half pairs, private use, line and paragraph separators.
    return bool(_BLANK.match(character)) or unicodedata.category(character) in ("Cf", "Cc", "Cs", "Co", "Zl", "Zp")


def _joins(text: str, place: int) -> bool:
    """Whether the joiner at `place` does what joiners are for."""
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    if not before or not after:
        return False
    if text[place] == "\u200d" and unicodedata.category(after) == "So":
        return unicodedata.category(before) in ("So", "Sk") or before == "\ufe0f"
    return all(unicodedata.name(neighbour, "").partition(" ")[0] in _JOINING for neighbour in (before, after))


# A half pair has no UTF-8 and would break the parser, so it becomes words before instead of after parsing.
_SURROGATE = re.compile("[\ud800-\udfff]")


def _without_surrogates(text: str) -> str:
    return _SURROGATE.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def _render_text(
    _renderer: RendererHTML, tokens: Sequence[Token], place: int, _options: OptionsDict, _env: MutableMapping[str, Any]
) -> str:
    return str(visible(tokens[place].content))


def _render_inline_code(
    _renderer: RendererHTML, tokens: Sequence[Token], place: int, _options: OptionsDict, _env: MutableMapping[str, Any]
) -> str:
    return f"<code>{visible(tokens[place].content)}</code>"


def _render_block(
    _renderer: RendererHTML, tokens: Sequence[Token], place: int, _options: OptionsDict, _env: MutableMapping[str, Any]
) -> str:
    return f"<pre><code>{visible(tokens[place].content)}</code></pre>\n"


def _render_link_end(
    _renderer: RendererHTML, tokens: Sequence[Token], place: int, _options: OptionsDict, _env: MutableMapping[str, Any]
) -> str:
    """Close a link and say where it goes, unless its own text says so."""
    start = place
    while tokens[start].type != "link_open":  # links hold no links
        start -= 1
    address = str(tokens[start].attrs.get("href", ""))
    if "".join(token.content for token in tokens[start:place]) == address:
        return "</a>"
    return f'</a> <span class="address">({escape(address)})</span>'


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": _DEEPEST})
    parser.enable(["table", "strikethrough"])
    parser.disable(["image", "reference"])  # a definition of a reference would not be seen
    for rule, render in (
        ("text", _render_text),
        ("code_inline", _render_inline_code),
        ("code_block", _render_block),
        ("fence", _render_block),
        ("link_close", _render_link_end),
    ):
        parser.add_render_rule(rule, render)
    return parser


_MARKDOWN = _parser()
