"""What a user can get wrong, through the command line: exit code 2, one clear sentence, nothing written."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.forked import Forked, run_command
from tests.models import save_model

from tastemaker.checkpoint import new_reward_model, save_reward_model
from tastemaker.cli import main

DEMONSTRATION = {"prompt": "w3 w4", "completion": "w5 w6"}
RANKING = {"prompt": "w3 w4", "responses": ["w5", "w6 w7", "w8"], "ranking": [[1], [0, 2]]}
PROMPT = {"prompt": "w3 w4"}
REWARDS = """
def ok(prompts, responses, records):
    return [float(len(response)) for response in responses]
def raises(prompts, responses, records):
    return [1 / 0]
def too_few(prompts, responses, records):
    return [1.0]
def not_a_number(prompts, responses, records):
    return [float("nan")] * len(responses)
def text(prompts, responses, records):
    return ["good"] * len(responses)
not_a_function = 3
"""
RECIPE = """
name = "r"
base.model = "MODEL"
[prompts]
source = "prompts.jsonl"
[demonstrations]
source = "demonstrations.jsonl"
[sft.baseline]
[policy.ppo]
kind = "ppo"
init = "baseline"
reward = "user_rewards:ok"
decoding = { max_new_tokens = 4 }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A command, the files that it finds (lines of JSON, text or bytes), and a part of the sentence it must say."""

    command: str
    says: str
    files: Mapping[str, Sequence[Mapping[str, Any]] | str | bytes] = field(default_factory=dict)
    written: tuple[str, ...] = ()


SFT = "sft --model MODEL --data data.jsonl --out out"
REWARD = "reward --model MODEL --data data.jsonl --out out"
PPO = "ppo --init MODEL --reward user_rewards:ok --data data.jsonl --out out --batch-size 4 --minibatches 2"
PPO += " --decoding.max-new-tokens 4"
DPO = "dpo --init MODEL --data data.jsonl --out out"
RUN = "run r.toml --out out"
TIED = RANKING | {"ranking": [[0, 1, 2]]}

CASES = {
    "no such file": Case(command=SFT, says="data.jsonl: there is no such file"),
    "empty file": Case(command=SFT, says="data.jsonl: is empty", files={"data.jsonl": ""}),
    "not JSON": Case(command=SFT, says="data.jsonl, line 1: invalid JSON", files={"data.jsonl": "{"}),
    "wrong keys": Case(
        command=SFT, says="data.jsonl, line 2", files={"data.jsonl": [DEMONSTRATION, {"question": "a", "answer": "b"}]}
    ),
    "not UTF-8": Case(command=SFT, says="line 1: not UTF-8: byte 0xe9", files={"data.jsonl": b'{"prompt": "caf\xe9"}'}),
    "a table of numbers": Case(command=SFT, says="expected a JSON object", files={"data.jsonl": "[1, 2]\n"}),
    "ranking with a missing index": Case(
        command=REWARD,
        says="line 1: 'ranking' [[1], [2]] must name",
        files={"data.jsonl": [RANKING | {"ranking": [[1], [2]]}]},
    ),
    "one response": Case(
        command=REWARD, says="line 1", files={"data.jsonl": [{"prompt": "w3", "responses": ["w4"], "ranking": [[0]]}]}
    ),
    "all tied, reward": Case(command=REWARD, says="no ranking prefers one response", files={"data.jsonl": [TIED]}),
    "all tied, dpo": Case(command=DPO, says="no ranking prefers one response", files={"data.jsonl": [TIED]}),
    "too few raters for the folds": Case(
        command=f"{REWARD} --cross-validation-folds 3", says="name only 1 raters", files={"data.jsonl": [RANKING] * 4}
    ),
    "demonstration longer than the context": Case(
        command=SFT,
        says="longer than the model's context of 64 tokens",
        files={"data.jsonl": [DEMONSTRATION | {"completion": "w1 " * 80}]},
    ),
    "every prompt longer than the context": Case(
        command=PPO,
        says="none of the 1 prompts leaves room for 4 new tokens",
        files={"data.jsonl": [{"prompt": "w1 " * 80}]},
    ),
    "no such model": Case(
        command=SFT.replace("MODEL", "./nowhere"),
        says="./nowhere does not exist",
        files={"data.jsonl": [DEMONSTRATION]},
    ),
    "a folder that is no model": Case(
        command=SFT.replace("MODEL", "./empty"),
        says="./empty is not a model folder: it has no config.json",
        files={"data.jsonl": [DEMONSTRATION], "empty/readme.txt": "x"},
    ),
    "a model file in place of a folder": Case(
        command=SFT.replace("MODEL", "data.jsonl"), says="is a file", files={"data.jsonl": [DEMONSTRATION]}
    ),
    "a model without an end token": Case(
        command=SFT.replace("MODEL", "ENDLESS"), says="no end-of-text token", files={"data.jsonl": [DEMONSTRATION]}
    ),
    "a tokenizer of another model": Case(
        command=SFT.replace("MODEL", "MISMATCHED"), says="do not belong together", files={"data.jsonl": [DEMONSTRATION]}
    ),
    "a gguf file that is not there": Case(
        command=SFT.replace("MODEL", "./x.gguf"),
        says="give the path of a GGUF file",
        files={"data.jsonl": [DEMONSTRATION]},
    ),
    "a damaged gguf file": Case(
        command=SFT.replace("MODEL", "./x.gguf"),
        says="x.gguf cannot be loaded as a GGUF file of a causal language model",
        files={"data.jsonl": [DEMONSTRATION], "x.gguf": b"GGUF"},
    ),
    "a gguf file as reward model": Case(
        command=PPO.replace("user_rewards:ok", "./x.gguf"),
        says="./x.gguf is a GGUF file, which holds a language model only; give the folder of a reward model",
        files={"data.jsonl": [RANKING], "x.gguf": b"GGUF"},
    ),
    "prompts too long for the value function": Case(
        command=PPO.replace("user_rewards:ok", "NARROW"),
        says="whose context is 7 tokens, but a prompt with its response may take 9; give a reward model with",
        files={"data.jsonl": [PROMPT]},
    ),
    "a reward model that is none": Case(
        command=PPO.replace("user_rewards:ok", "MODEL"),
        says="is a language model (LlamaForCausalLM), not a reward model; are two options swapped",
        files={"data.jsonl": [PROMPT]},
    ),
    "a reward model as a language model": Case(
        command=SFT.replace("MODEL", "NARROW"),
        says="is a reward model (GPT2ForSequenceClassification), not a language model",
        files={"data.jsonl": [DEMONSTRATION]},
    ),
    "the folder of a stage in place of its model": Case(
        command=REWARD.replace("MODEL", "HOME"),
        says="is not a model folder: it has no config.json; HOME/model is one",
        files={"data.jsonl": [RANKING]},
    ),
    "learning rate NaN": Case(command=f"{SFT} --optimizer.learning-rate nan", says="learning_rate is nan"),
    "learning rate negative": Case(command=f"{SFT} --optimizer.learning-rate -1", says="learning_rate is -1.0"),
    "checkpoints every 0 steps": Case(command=f"{SFT} --checkpoint-every 0", says="checkpoint_every is 0"),
    "models kept every 0 iterations": Case(command=f"{PPO} --keep-every 0", says="keep_every is 0"),
    "a KL target of 0": Case(
        command=f"{PPO} adaptive-kl:adaptive-kl --adaptive-kl.target 0", says="target is 0.0; it must be above 0"
    ),
    "pieces of no token": Case(command=f"{SFT} --max-text-tokens 0", says="max_text_tokens is 0"),
    "betas that diverge": Case(command=f"{SFT} --optimizer.betas 2 2", says="betas is (2.0, 2.0)"),
    "no gradient let through": Case(command=f"{SFT} --optimizer.max-grad-norm 0", says="max_grad_norm is 0.0"),
    "no thread": Case(command=f"{SFT} --threads 0", says="threads is 0; it must be at least 1"),
    "a reward model that reads nothing": Case(command=f"{REWARD} --max-prompt-tokens 0", says="max_prompt_tokens is 0"),
    "a reward model that reads less": Case(command=f"{REWARD} --max-prompt-tokens -5", says="max_prompt_tokens is -5"),
    "a seed of twenty digits": Case(
        command=f"{REWARD} --seed 99999999999999999999", says="it must be from 0 to 4294967295"
    ),
    "folds below none": Case(
        command=f"{REWARD} --cross-validation-folds -2", says="cross_validation_folds is -2; it must be at least 0"
    ),
    "dropout of everything": Case(
        command=f"{SFT} --residual-dropout 1.5", says="residual_dropout is 1.5; it must be at least 0 and below 1"
    ),
    "micro-batches of nothing": Case(command=f"{SFT} --microbatch-tokens 0", says="microbatch_tokens is 0"),
    "warm-up before the start": Case(command=f"{SFT} --optimizer.warmup-steps -5", says="warmup_steps is -5"),
    "iterations before the start": Case(command=f"{PPO} --warmup-iterations -3", says="warmup_iterations is -3"),
    "adapters of rank 0": Case(command=f"{PPO} --lora.rank 0 --seed 3", says="rank is 0"),
    "no epochs": Case(command=f"{SFT} --epochs 0", says="epochs is 0"),
    "a word for a number": Case(command=f"{SFT} --epochs many", says="--epochs"),
    "unknown option": Case(command=f"{SFT} --epoch 3", says="--epoch"),
    "missing options": Case(command="sft --epochs 3", says="Required: --model, --data, --out"),
    "a required option misspelt": Case(
        command=SFT.replace("--model", "--modle"), says="Unknown: --modle. Did you mean --model? Required: --model."
    ),
    "an option of a section misspelt": Case(command=f"{PPO} --lora.rnk 4", says="Did you mean --lora.rank?"),
    "unknown variant of a loss": Case(command=f"{DPO} --variant hinge", says="'hinge'"),
    "unknown treatment of truncated responses": Case(command=f"{PPO} --truncated drop", says="'drop'"),
    "greedy rollouts": Case(command=f"{PPO} --decoding.greedy", says="policy gradients need sampled responses"),
    "sampler log-probs in bf16": Case(
        command=f"{PPO} --old-logprobs sampler --policy.precision bfloat16", says="in bf16 the two differ too much"
    ),
    "ptx without text": Case(
        command=f"{PPO} --ptx-coef 1", says="no pretraining text was given", files={"data.jsonl": [PROMPT]}
    ),
    "mix without text": Case(
        command=f"{SFT} --pretraining-mix 0.1",
        says="no pretraining text was given",
        files={"data.jsonl": [DEMONSTRATION]},
    ),
    "reward function raises": Case(
        command=PPO.replace(":ok", ":raises"),
        says="user_rewards:raises failed with ZeroDivisionError: division by zero (HERE/user_rewards.py, line 5)",
        files={"data.jsonl": [PROMPT]},
    ),
    "reward function returns too few": Case(
        command=PPO.replace(":ok", ":too_few"),
        says="user_rewards:too_few returned 1 scores for 4 responses",
        files={"data.jsonl": [PROMPT]},
    ),
    "reward function returns NaN": Case(
        command=PPO.replace(":ok", ":not_a_number"), says="returned nan as a score", files={"data.jsonl": [PROMPT]}
    ),
    "reward function returns text": Case(
        command=PPO.replace(":ok", ":text"),
        says="user_rewards:text failed with ValueError",
        files={"data.jsonl": [PROMPT]},
    ),
    "no such reward function": Case(
        command=PPO.replace(":ok", ":okay"), says="has no 'okay'", files={"data.jsonl": [PROMPT]}
    ),
    "no such module": Case(
        command=PPO.replace("user_rewards", "nowhere_at_all"),
        says="no module 'nowhere_at_all'",
        files={"data.jsonl": [PROMPT]},
    ),
    "a module that does not import": Case(
        command=PPO.replace("user_rewards", "user_broken"),
        says="importing user_broken fails with ZeroDivisionError",
        files={"data.jsonl": [PROMPT], "user_broken.py": "1 / 0"},
    ),
    "out holds something else": Case(
        command=SFT,
        says="out holds something that is not a stage of ours",
        files={"data.jsonl": [DEMONSTRATION], "out/thesis.txt": "precious"},
    ),
    "out is a file": Case(
        command=SFT, says="out is a file; give a new", files={"data.jsonl": [DEMONSTRATION], "out": "precious"}
    ),
    "out in a place where nothing can be written": Case(
        command=SFT.replace("--out out", "--out /proc/nowhere/out"),
        says="error: /proc/nowhere: No such file or directory.",
        files={"data.jsonl": [DEMONSTRATION]},
    ),
    "out above what is read": Case(
        command=SFT.replace("data.jsonl", "out/data.jsonl"),
        says="--data out/data.jsonl lies inside --out out; give another --out",
        files={"out/data.jsonl": [DEMONSTRATION], "out/manifest.json": '{"stage": "sft"}'},
    ),
    "names and folders that are no pairs": Case(
        command="evaluate --policies a MODEL b --data data.jsonl --judge user_rewards:ok --out out",
        says="--policies takes names and folders in pairs: new PATH old PATH; 3 were given.",
    ),
    "one policy to compare": Case(
        command="evaluate --policies a MODEL --data data.jsonl --judge user_rewards:ok --out out",
        says="at least two policies",
    ),
    "no such command": Case(command="stf --model MODEL", says="there is no command 'stf'. Did you mean 'sft'?"),
    "no such recipe": Case(command=RUN, says="r.toml does not exist"),
    "a recipe that is no TOML": Case(command=RUN, says="r.toml is not a TOML file", files={"r.toml": "name ="}),
    "unknown key of a recipe": Case(
        command=RUN,
        says="r.toml: sft: baseline: unknown key 'epoch'. Did you mean 'epochs'?",
        files={"r.toml": RECIPE.replace("[sft.baseline]", "[sft.baseline]\nepoch = 3")},
    ),
    "unknown field on the command line": Case(
        command=f"{RUN} --policy.ppo.kl-coeff 1", says="Did you mean --policy.ppo.kl-coef?", files={"r.toml": RECIPE}
    ),
    "unknown reward variant": Case(
        command=RUN, says="'main' is no reward variant", files={"r.toml": RECIPE.replace("user_rewards:ok", "main")}
    ),
    "a choice among epochs that are not kept": Case(
        command=RUN,
        says="selection: baseline: its epochs are chosen among, but sft.baseline.keep_epochs is 'last'",
        files={
            "r.toml": RECIPE.replace("[sft.baseline]", "[sft.baseline]\nkeep_epochs = 'last'")
            + "[selection]\nbaseline = 'main'\n[reward.main]\n[comparisons]\nsources = ['sft/baseline']\n"
        },
    ),
    "unknown kind of policy": Case(
        command=RUN,
        says="kind is 'grpo'; it must be one of 'ppo', 'dpo'",
        files={"r.toml": RECIPE.replace('"ppo"', '"grpo"')},
    ),
    "a run whose model is not there": Case(
        command=RUN, says="./nowhere does not exist", files={"r.toml": RECIPE.replace("MODEL", "./nowhere")}
    ),
    "a run whose file is not there": Case(
        command=RUN,
        says="demonstrations.jsonl: there is no such file",
        files={"r.toml": RECIPE, "prompts.jsonl": [PROMPT]},
    ),
    "a run whose guideline is not there": Case(
        command=f"{RUN} --guidelines.training rules.md",
        says="rules.md: the guideline cannot be read (No such file or directory); give a text or Markdown file.",
        files={"r.toml": RECIPE, "prompts.jsonl": [PROMPT], "demonstrations.jsonl": [DEMONSTRATION]},
    ),
    "a guideline without words": Case(
        command=f"{RUN} --guidelines.evaluation rules.md",
        says="rules.md: the guideline is empty; write what raters are to do.",
        files={
            "r.toml": RECIPE,
            "prompts.jsonl": [PROMPT],
            "demonstrations.jsonl": [DEMONSTRATION],
            "rules.md": "\n \n",
        },
    ),
    "a run whose reward is no function": Case(
        command=RUN,
        says="'user_rewards:not_a_function' is not a function",
        files={
            "r.toml": RECIPE.replace(":ok", ":not_a_function"),
            "prompts.jsonl": [PROMPT],
            "demonstrations.jsonl": [DEMONSTRATION],
        },
    ),
    "test prompts in the demonstrations": Case(
        command=RUN,
        says="1 test prompts also occur in the demonstrations",
        files={
            "r.toml": RECIPE,
            "prompts.jsonl": [PROMPT | {"split": "test"}, {"prompt": "w9", "split": "train"}],
            "demonstrations.jsonl": [DEMONSTRATION],
        },
        written=("out/labels.db", "out/recipe.json", "out/round-1/1-prompts/"),
    ),
    "a label store that is not there": Case(
        command="label status --database labels.db", says="labels.db: does not exist"
    ),
    "a run that is none": Case(command="report out", says="out", files={"out/thesis.txt": "precious"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, one without an end token, one whose tokenizer has more words than it has embeddings, a reward model
    whose context is 7 tokens, and a stage's folder with a model in it."""
    home = tmp_path_factory.mktemp("models")
    good = save_model(home / "good", max_position_embeddings=64)
    endless = home / "endless"
    shutil.copytree(good, endless)
    settings = json.loads((endless / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (endless / "tokenizer_config.json").write_text(json.dumps(settings))
    mismatched = save_model(home / "mismatched", vocabulary=50)
    narrow, short = home / "narrow", save_model(home / "short", "gpt2", n_positions=7)
    save_reward_model(narrow, new_reward_model(str(short), seed=0))
    shutil.copytree(good, home / "stage/model")
    return {
        "MODEL": good,
        "ENDLESS": endless,
        "MISMATCHED": mismatched,
        "NARROW": narrow,
        "HOME": home / "stage",
    }


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the user runs the command, with a module of their own in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "user_rewards", raising=False)
    (tmp_path / "user_rewards.py").write_text(REWARDS)
    return tmp_path


def lay_out(files: Mapping[str, Sequence[Mapping[str, Any]] | str | bytes], fill: Callable[[str], str]) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        elif isinstance(content, str):
            Path(name).write_text(fill(content))
        else:
            Path(name).write_text("".join(json.dumps(row) + "\n" for row in content))


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_sentence(
    name: str, models: dict[str, Path], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]

    def fill(text: str) -> str:
        for word, path in {**models, "HERE": workplace}.items():
            text = text.replace(word, str(path))
        return text

    lay_out(case.files, fill)
    before = everything(workplace)
    code = main(fill(case.command).split())
    said = capsys.readouterr().err
    assert code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert said.splitlines()[-1] == errors[0]
    assert "Traceback" not in said
    assert fill(case.says) in errors[0]
    after = {
        name: content for name, content in everything(workplace).items() if not name.startswith(case.written or "//")
    }
    assert after == before


def test_reward_models_are_not_policies_and_say_so(
    models: dict[str, Path], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_reward_model(workplace / "rm", new_reward_model(str(models["MODEL"]), seed=0))
    (workplace / "data.jsonl").write_text(json.dumps(DEMONSTRATION) + "\n")
    assert main(["sft", "--model", "rm", "--data", "data.jsonl", "--out", "out"]) == 2
    assert "rm" in capsys.readouterr().err
    assert not (workplace / "out").exists()


def test_a_failed_command_leaves_an_earlier_result_alone(
    models: dict[str, Path], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "data.jsonl").write_text(json.dumps(DEMONSTRATION) + "\n")
    command = ["sft", "--model", str(models["MODEL"]), "--data", "data.jsonl", "--out", "out", "--epochs", "1"]
    assert main(command) == 0
    before = everything(workplace)
    assert main([*command, "--replace", "--pretraining-mix", "0.5"]) == 2
    assert everything(workplace) == before
    assert main(command) == 0
    assert "out is up to date" in capsys.readouterr().err


def in_little_room(command: Sequence[str]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    run_command(command)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "error: out/model cannot be written: "),
        (["--checkpoint-every", "1"], "error: out/checkpoint/state.pt: File too large."),
    ],
)
def test_a_full_disk_is_told_in_one_sentence(
    given: list[str], says: str, models: dict[str, Path], workplace: Path
) -> None:
    """No file may grow beyond 20 kB, so the first model or state cannot be written.

    The signal is what a disk would not send.
    """
    (workplace / "data.jsonl").write_text(2 * (json.dumps(DEMONSTRATION) + "\n"))
    command = ["sft", "--model", str(models["MODEL"]), "--data", "data.jsonl", "--out", "out", "--epochs", "1"]
    command += ["--batch-size", "1", *given]
    log = workplace.with_suffix(".log")
    assert Forked(in_little_room, command, log=log).wait(300) == 2
    expected, said = log.read_text().splitlines()
    assert "expected at the peak" in expected
    assert said.startswith(says)
