"""The command line: one command a step. Nothing heavy is imported before a command is chosen, so --help is instant.

A command that trains imports torch when its options and files are read, so what is wrong with them is said at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from tastemaker import __version__, processes
from tastemaker.config import nearest
from tastemaker.errors import ConfigError, TastemakerError

# name -> (what it does, the module of tastemaker.commands that has a function of the command's name)
COMMANDS = {
    "run": ("run a recipe: the whole paper, from prompts to the report", "whole"),
    "prompts": ("take in prompts: filter, label, split", "intake"),
    "sft": ("fine-tune a model on demonstrations", "training"),
    "reward": ("train a reward model on rankings", "training"),
    "ppo": ("optimise a policy for a reward model or a Python function (PPO, PPO-ptx)", "training"),
    "dpo": ("optimise a policy on rankings directly (DPO, IPO)", "training"),
    "evaluate": ("compare policies on prompts, judged by a reward model or a Python function", "whole"),
    "sample": ("sample responses of policies, to read or to have ranked; talk with one", "sampling"),
    "inspect": ("show what a stage sees of its data, token by token", "inspecting"),
    "label": ("let people answer in the browser; see what is missing, hand out tasks, take answers in", "people"),
    "report": ("write report.html for a run", "whole"),
    "doctor": ("say what looks wrong with a run, why, and what to try", "doctor"),
}
# What several processes can do together; `torchrun` starts them.
TOGETHER = ("sft", "reward", "ppo", "dpo")
INTERRUPTED = 130
LESS_MEMORY = (
    "The same command continues from its last checkpoint, with smaller micro-batches too: a training takes "
    "`--max-memory`, sampling a smaller `batch_tokens`; docs/memory.md has what else saves memory."
)
# What stops all processes at once the first writes down for the doctor, and puts an earlier result back.
# `torchrun` ends it as soon as another one ends, which so waits: long enough for a slow file system, and nobody minds.
GRACE_SECONDS = 5.0
EPILOGUE = """\
`tastemaker COMMAND --help` lists a command's options. A recipe's fields can be set on the command line:
  tastemaker run recipes/tiny.toml --out out/demo --seed 1 --policy.ppo-ptx.kl-coef 0.05
Exit codes: 0 done; 1 the doctor found something wrong, or the program broke with a traceback; 2 something given is
wrong, a check stopped training or memory ran out, one sentence says what; 3 people have to answer first; 130
interrupted, and the same command goes on."""


def usage() -> str:
    """The text of `tastemaker --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tastemaker COMMAND [options]",
            "",
            "Teach a language model by human preference: demonstrations, rankings, a reward model,",
            "PPO or DPO, and blind evaluation.",
            "",
            "commands:",
            *lines,
            "",
            EPILOGUE,
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    return _one_of_several(arguments) if processes.several() else _run(arguments)


def _one_of_several(arguments: Sequence[str] | None) -> NoReturn:
    """The same, and this process ends; after an error `torchrun` ends the others then."""
    try:
        code = _run(arguments)
    except Exception:
        traceback.print_exc()
        code = 1
    if code == 0:
        from tastemaker import parallel

        parallel.leave()
    elif code != INTERRUPTED and not processes.is_first():
        sys.stderr.flush()
        time.sleep(GRACE_SECONDS)
    processes.end(code)


def _run(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if given[0] in ("-V", "--version"):
        print(f"tastemaker {__version__}")
        return 0
    name, *rest = given
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}. {nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    try:
        _check_together(name)
        module = importlib.import_module(f"tastemaker.commands.{COMMANDS[name][1]}")
        code: int | None = getattr(module, name)(rest)
    except TastemakerError as error:
        kind = "waiting" if error.exit_code == 3 else "error"
        where = f" in process {processes.number()}" if processes.several() else ""
        print(f"{kind}{where}: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as exit_:  # a parser has printed its help
        return int(exit_.code or 0)
    except BrokenPipeError:  # whoever read our output has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that cannot be written, a full disk
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}.", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        print(
            f"error: memory ran out: {str(error).strip() or 'Python could allocate no more'}\n{LESS_MEMORY}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return INTERRUPTED
    return code or 0


def _is_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether memory ran out. PyTorch has a class for that of a GPU, and for the processor's a RuntimeError's words."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _check_together(name: str) -> None:
    """Refuse several processes for what one does alone."""
    if processes.several() and name not in TOGETHER:
        raise ConfigError(f"{name} is done by one process; several can do {', '.join(TOGETHER)}.")


if __name__ == "__main__":
    sys.exit(main())
