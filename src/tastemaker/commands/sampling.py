"""The command that samples: responses to a file of prompts, ready to be labelled; or to what is typed, to be read."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.text import Text

from tastemaker import sources
from tastemaker.commands.alone import stage
from tastemaker.commands.options import also, check_pairs, inputs, parse, read_records
from tastemaker.console import progress
from tastemaker.errors import ConfigError, DataError
from tastemaker.files import atomic_write, read_prompts
from tastemaker.ranges import check_range, check_seed_and_threads
from tastemaker.records import Message, Prompt
from tastemaker.settings import Precision

if TYPE_CHECKING:
    from tastemaker.records import Response
    from tastemaker.responses import DecodingConfig, TextPiece

Named = list[tuple[str, "Response"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _SampleOptions:
    """Sample responses of one policy or several: to a file of prompts, or to one prompt, or in a conversation.

    OUT/responses.jsonl has a row a prompt with `responses` and `sources`, the policies that wrote them. It is what
    the labelling application imports for people to rank, rate or compare.
    """

    policies: dict[str, str]
    """Names and models: --policies new out/ppo/model old out/sft/model."""
    data: str | None = None
    """A file of prompts."""
    out: Path | None = None
    """The folder to write, with --data."""
    prompt: str | None = None
    """One prompt, in place of --data and --out."""
    responses_per_prompt: int = 1
    """Responses of each policy."""
    stop: tuple[str, ...] = ()
    """Texts that end a response too, and are left out of it: a base model goes on with the next question after
    `--stop "Q:"`."""
    stream: bool = False
    """With --prompt: print the response while it is sampled."""
    chat: bool = False
    """In place of --prompt: talk with one policy. Every line that you enter is a turn, and an empty one ends. Ctrl-C
    stops an answer; one that is stopped or cut off stays in the conversation as it is."""
    max_new_tokens: Annotated[int, also("--decoding.max-new-tokens")] = 256
    """Where a response is cut off; `--decoding.max-new-tokens`, as ppo has it, is the same."""
    temperature: Annotated[float, also("--decoding.temperature")] = 1.0
    """Logits are divided by it."""
    greedy: Annotated[bool, also("--decoding.greedy")] = False
    """Take the likeliest token each time."""
    precision: Annotated[Precision, also("--decoding.precision")] = "float32"
    """What matrix products are computed in; bfloat16 is faster, and its words differ in places."""
    replace: bool = False
    """Write over a finished result of other settings in OUT."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (none: all)."""

    def __post_init__(self) -> None:
        check_seed_and_threads(self)
        check_range(self, "responses_per_prompt", least=1)
        if [self.prompt is not None, self.data is not None, self.chat].count(True) != 1:
            raise ConfigError("give one of these: --data FILE with --out FOLDER, one --prompt TEXT, or --chat.")
        if (self.data is None) != (self.out is None):
            raise ConfigError("--data and --out go together: what is sampled for a file is written to a folder.")
        if self.greedy and self.responses_per_prompt > 1:
            raise ConfigError("greedy decoding gives the same response each time; leave --responses-per-prompt at 1.")
        if self.stream and (self.prompt is None or self.responses_per_prompt > 1):
            raise ConfigError("--stream prints one response as it comes; give it one --prompt, and no more responses.")
        if not self.policies:
            raise ConfigError("give at least one policy: --policies NAME PATH.")
        if self.chat and (len(self.policies) > 1 or self.responses_per_prompt > 1):
            raise ConfigError("--chat is with one policy, and one response a turn; name one with --policies.")


def sample(arguments: Sequence[str]) -> None:
    """`tastemaker sample`"""
    from tastemaker.responses import DecodingConfig

    check_pairs(arguments)
    options = parse(_SampleOptions, arguments, "sample")
    decoding = DecodingConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        greedy=options.greedy,
        precision=options.precision,
        stop_texts=options.stop,
    )
    if options.chat:
        _chat(options, decoding)
        return
    if options.data is None or options.out is None:
        asked = Prompt(messages=(Message("user", options.prompt or ""),))
        if options.stream:
            _stream(options, asked, decoding)
            return
        (sampled,) = _sample(options, [asked], decoding)
        _show(sampled)
        return
    rows = read_records(options.data, read_prompts, Prompt)

    def work(folder: Path) -> None:
        with atomic_write(folder / "responses.jsonl") as file:
            for prompt, sampled in zip(rows, _sample(options, rows, decoding), strict=True):
                row = prompt.to_json() | {
                    "id": prompt.key,
                    "responses": [response.text for _, response in sampled],
                    "finished": [response.finished for _, response in sampled],
                    "sources": [name for name, _ in sampled],
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    shaped = {"order": list(options.policies), "per prompt": options.responses_per_prompt}
    read = inputs(options, "data") | {"shape": json.dumps(shaped)}
    read |= {f"policy/{name}": sources.fingerprint(path) for name, path in options.policies.items()}
    place = options.out / "responses.jsonl"
    stage(options.out, "sample", decoding, read, work, replace=options.replace, result=lambda _: f"responses: {place}")


def _sample(options: _SampleOptions, prompts: Sequence[Prompt], decoding: DecodingConfig) -> list[Named]:
    """Every policy's responses to each prompt."""
    from tastemaker import parallel
    from tastemaker.checkpoint import load_policy, load_reader
    from tastemaker.responses import check_room, sample_responses

    device, each = parallel.prepare(options.threads), options.responses_per_prompt
    found: list[Named] = [[] for _ in prompts]
    for name, path in options.policies.items():
        check_room(prompts, load_reader(path), decoding.max_new_tokens, name)
    for name, path in options.policies.items():
        policy = load_policy(path).to(device)
        with progress(f"responses of {name}", each * len(prompts)) as ticker:
            groups = sample_responses(
                policy,
                prompts,
                n=each,
                decoding=decoding,
                seed=options.seed,
                purpose=_purpose(name),
                progress=ticker.advance,
            )
        for sampled, responses in zip(found, groups, strict=True):
            sampled += [(name, response) for response in responses]
    return found


def _stream(options: _SampleOptions, prompt: Prompt, decoding: DecodingConfig) -> None:
    """Print every policy's response as it is sampled."""
    from tastemaker import parallel
    from tastemaker.checkpoint import load_policy, load_reader
    from tastemaker.responses import check_room, stream_response

    device, console = parallel.prepare(options.threads), Console()
    for name, path in options.policies.items():
        check_room([prompt], load_reader(path), decoding.max_new_tokens, name)
    for name, path in options.policies.items():
        policy = load_policy(path).to(device)
        console.print(Text(name, style="bold"))
        _print_growing(
            console, stream_response(policy, prompt, decoding=decoding, seed=options.seed, purpose=_purpose(name))
        )
        console.print()


def _chat(options: _SampleOptions, decoding: DecodingConfig) -> None:
    """Respond to every line that is entered, knowing those before it, until one is empty or there is none."""
    from tastemaker import parallel
    from tastemaker.checkpoint import load_policy, load_reader
    from tastemaker.responses import check_room, engine_for, leaves_room, stream_response

    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history, where there are any)
    ((name, path),) = options.policies.items()
    # Before weights are loaded: some templates take no second turn, and a context may be too short for any.
    several = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    check_room([Prompt(messages=several)], load_reader(path), decoding.max_new_tokens, name)
    device, console = parallel.prepare(options.threads), Console()
    policy = load_policy(path).to(device)
    engine = engine_for(policy, decoding)
    messages: tuple[Message, ...] = ()
    while said := _entered(console):
        messages += (Message("user", said),)
        length = len(policy.tokenizer.prompt_ids(messages))
        if not leaves_room(length, policy, decoding.max_new_tokens):
            raise DataError(
                f"the conversation has {length} tokens; with {decoding.max_new_tokens} more it does not fit into the "
                f"context of {policy.context}. Begin another one, or lower --max-new-tokens."
            )
        prompt, purpose = Prompt(messages=messages), _purpose(name)
        pieces = stream_response(policy, prompt, decoding=decoding, seed=options.seed, purpose=purpose, engine=engine)
        messages += (Message("assistant", _print_growing(console, pieces, stoppable=True)),)


def _entered(console: Console) -> str:
    """The next line without control characters; empty at the end of the input."""
    try:
        line = console.input("[bold]>[/bold] ")
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""
    except UnicodeDecodeError as error:
        raise DataError(
            f"what was entered is no text in {error.encoding}; set the terminal or the file to it."
        ) from error
    line = Text.from_ansi(line).plain  # without what arrow keys leave where there is no readline
    return "".join(sign for sign in line if unicodedata.category(sign) not in ("Cc", "Cs")).strip()


def _print_growing(console: Console, pieces: Iterator[TextPiece], *, stoppable: bool = False) -> str:
    """Print a response while it is sampled, and return it; `stoppable` by Ctrl-C, which keeps what there is."""
    text = ""
    try:
        for piece in pieces:
            text += piece.text
            console.print(Text(without_controls(piece.text)), soft_wrap=True, end="")
            if piece.finished is not None:
                console.print(Text("" if piece.finished else " (cut off)", style="bold"))
    except KeyboardInterrupt:
        if not stoppable:
            raise
        console.print(Text(" (stopped)", style="bold"))
    return text


def _purpose(policy: str) -> str:
    """What a response's seed is derived from: streamed or not, it is the same response."""
    return f"sample/{policy}"


def without_controls(text: str) -> str:
    """A model's text as it may be shown on a terminal, which would obey its escape sequences."""
    return "".join(
        sign if sign in "\n\t" or unicodedata.category(sign) != "Cc" else "\N{REPLACEMENT CHARACTER}" for sign in text
    )


def _show(sampled: Named) -> None:
    console = Console()
    for name, response in sampled:
        console.print(Text(name if response.finished else f"{name} (cut off)", style="bold"))
        console.print(Text(without_controls(response.text)), soft_wrap=True)
        console.print()
