"""What whoever trains can set: the configs of stages that train, of their optimizers, their decoding, their adapters.

They stand here and not beside the code that they configure, because that code imports torch: a command's help, and what
it says of a mistyped option, would take seconds. Each is also to be had from the module that it configures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tastemaker.errors import ConfigError
from tastemaker.halves import Part
from tastemaker.ranges import check_range

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule. The paper: betas 0.9 and 0.95, cosine to 10 % for supervised stages, constant in RL."""

    learning_rate: float
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after warm-up."""
    floor: float = 0.1
    """The rate at the end, as a share of the peak (cosine and linear)."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises to its peak, from a tenth of it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's two decays."""
    epsilon: float = 1e-8
    """Adam's epsilon, as PyTorch places it (outside the bias correction)."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    precision: Precision = "float32"
    """What matrix products are computed in; weights and their updates are fp32 always."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input, and compute the rest again for the gradients: less memory, a third more time."""
    compile: bool = False
    """Run the layers through torch.compile, for GPUs; the first steps take minutes."""

    def __post_init__(self) -> None:
        check_range(self, "learning_rate", "epsilon", "max_grad_norm", above=0)
        check_range(self, "floor", least=0, most=1)
        check_range(self, "warmup_steps", "weight_decay", least=0)
        check_range(self, "betas", least=0, below=1)
        if self.compile and self.gradient_checkpointing:
            raise ConfigError("compile and gradient_checkpointing do not go together; set one of them to false.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: `rank` of the update, scaled by `alpha` / rank, on `targets` (None: peft's choice)."""

    rank: int = 16
    """Rank of an update."""
    alpha: int = 32
    """Updates are scaled by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Names of the layers that get adapters (none: peft's choice)."""

    def __post_init__(self) -> None:
        check_range(self, "rank", "alpha", least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingConfig:
    """How responses are decoded: drawn at `temperature`, or the likeliest token each time (`greedy`)."""

    max_new_tokens: int = 256
    """Where a response is cut off."""
    temperature: float = 1.0
    """Logits are divided by it."""
    greedy: bool = False
    """Take the likeliest token each time."""
    batch_tokens: int = 16384
    """Tokens of prompt and response that are decoded together."""
    precision: Precision | None = None
    """What matrix products are computed in (None: in PPO what the policy trains in, elsewhere float32)."""
    stop_texts: tuple[str, ...] = ()
    """A response that comes to one of these texts ends before it; not in PPO."""

    def __post_init__(self) -> None:
        check_range(self, "max_new_tokens", "batch_tokens", least=1)
        if "" in self.stop_texts:
            raise ConfigError("stop_texts has an empty text, at which every response would end at once; leave it out.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be above 0. For the likeliest token set greedy = true."
            )

    @property
    def law(self) -> dict[str, object]:
        """What shapes a response; how many are decoded together does not. A setting that came later is named where it
        is used, so that what people have answered before still counts."""
        law: dict[str, object] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "greedy": self.greedy,
        }
        if self.precision == "bfloat16":
            law["precision"] = self.precision
        if self.stop_texts:
            law["stop_texts"] = list(self.stop_texts)
        return law

    @property
    def name(self) -> str:
        return "greedy" if self.greedy else f"T={self.temperature:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning. The defaults are the paper's (1.3B and 6B)."""

    epochs: int = 16
    """Passes over the demonstrations."""
    batch_size: int = 32
    """Demonstrations in an optimizer step."""
    keep_epochs: Literal["all", "last"] = "all"
    """"all" keeps every epoch's model, to choose among them later; "last" that of the last epoch, as `model`."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9.65e-6)
    """AdamW and its schedule."""
    residual_dropout: float = 0.2
    """Dropout of the residual stream, where the architecture has it."""
    pretraining_mix: float = 0.0
    """Share of a batch's sequences that are pretraining text, added to the demonstrations."""
    max_text_tokens: int = 512
    """Pretraining documents are cut into pieces of this length."""
    microbatch_tokens: int = 8192
    """Tokens (padding inside attention included) that go through the model at once."""
    checkpoint_every: int = 100
    """Optimizer steps between checkpoints."""

    def __post_init__(self) -> None:
        check_range(self, "epochs", "batch_size", "microbatch_tokens", "checkpoint_every", least=1)
        check_range(self, "max_text_tokens", least=2)  # a piece's first token is not predicted
        check_range(self, "residual_dropout", "pretraining_mix", least=0, below=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """Reward model training. The defaults are the paper's."""

    init: str = "baseline"
    """In a recipe, the SFT variant to start from, or "base"; alone, `--model` says it."""
    part: Part = "all"
    """Which training prompts to learn from. Two models on different halves are independent judges of each other."""
    epochs: int = 1
    """Passes over the rankings. More overfit quickly (C.2)."""
    batch_size: int = 64
    """Prompts in an optimizer step."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9e-6)
    """AdamW and its schedule."""
    max_prompt_tokens: int | None = None
    """The longest prompt it reads, in training and later; a longer one loses its beginning (None: its context)."""
    normalize: Literal["pairs", "all"] = "pairs"
    """Divide a prompt's loss by its untied pairs, or by all C(K,2)."""
    grouping: Literal["prompt", "pairs"] = "prompt"
    """"prompt": all pairs of a prompt together (the paper). "pairs": shuffled pairs, for comparison."""
    cross_validation_folds: int = 0
    """With 5: five groups of raters, each held out once (E.2); adds five trainings."""
    microbatch_tokens: int = 8192
    """Tokens (padding inside attention included) that go through the model at once."""
    checkpoint_every: int = 50
    """Optimizer steps between checkpoints."""

    def __post_init__(self) -> None:
        check_range(self, "epochs", "batch_size", "microbatch_tokens", "checkpoint_every", "max_prompt_tokens", least=1)
        check_range(self, "cross_validation_folds", least=0)
        if self.cross_validation_folds == 1:
            raise ConfigError("cross_validation_folds is 1; give 0 for none, or at least 2.")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveKl:
    """Steer the KL coefficient towards a target (Ziegler et al.); `target` in nats a response."""

    target: float = 6.0
    """Nats a response."""
    horizon: float = 10_000.0
    """Episodes over which the controller acts; above a fifth of batch_size."""

    def __post_init__(self) -> None:
        check_range(self, "target", "horizon", above=0)


VALUE_OPTIMIZER = OptimizerConfig(learning_rate=9e-6, schedule="constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoConfig:
    """PPO. The defaults are the paper's (1.3B) where it states them."""

    kind: Literal["ppo"] = "ppo"
    init: str
    """What PPO starts from and is held to: in a recipe an SFT variant or "base", alone a model."""
    reward: str
    """In a recipe a reward variant, alone a reward model's folder; or a Python function `module:function`."""
    iterations: int = 500
    """Rollouts, each followed by an update."""
    batch_size: int = 512
    """Episodes in an iteration."""
    minibatches: int = 8
    """Optimizer steps that an inner epoch is cut into."""
    inner_epochs: int = 1
    """Passes over the episodes of an iteration."""
    decoding: DecodingConfig = DecodingConfig(max_new_tokens=1024)
    """Rollouts: the length limit and the temperature, which applies to the log-probs of policy and reference too."""
    policy: OptimizerConfig = OptimizerConfig(learning_rate=5e-6, schedule="constant")
    """The policy's optimizer."""
    value: OptimizerConfig = VALUE_OPTIMIZER
    """The optimizer of a separate value function."""
    warmup_iterations: int = 10
    """Iterations over which learning rates rise to their peak."""
    kl_coef: float = 0.02
    """Beta of Eq. 2."""
    adaptive_kl: AdaptiveKl | None = None
    """Steer kl_coef, which must be above 0, towards a target."""
    gamma: float = 1.0
    """Discount (paper: none)."""
    lam: float = 0.95
    """Lambda of the advantage estimates."""
    clip: float = 0.2
    """How far a ratio may leave 1."""
    value_clip: float = 0.2
    """How far a value may leave its old one."""
    value_function: Literal["separate", "shared"] = "separate"
    """"shared" puts the value head on the policy's own trunk: a different, cheaper algorithm."""
    value_coef: float = 0.1
    """Weight of the value loss where the trunk is shared."""
    whiten_advantages: bool = True
    """To mean 0 and variance 1 over the batch."""
    truncated: Literal["penalty", "score", "mask"] = "penalty"
    """A response cut off at the length limit: loses `truncation_penalty`, is scored as it is, or trains nothing."""
    truncation_penalty: float = 1.0
    """What a cut off response loses."""
    ptx_coef: float = 0.0
    """Gamma of Eq. 2: weight of the pretraining loss per token beside the policy loss per token; 0 is plain PPO."""
    ptx_examples_per_episode: float = 8.0
    """Pieces of text for each episode and inner epoch, at least one a minibatch (paper: 8)."""
    max_text_tokens: int = 512
    """Pretraining documents are cut into pieces of this length."""
    ema_decay: float = 0.992
    """Decay of the weight average per 512 episodes; at 0 it is the policy itself."""
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    """"sampler" saves a forward pass; only for fp32, where sampler and trainer agree to 5e-5."""
    lora: LoraConfig | None = None
    """Train adapters in place of all weights."""
    microbatch_tokens: int = 8192
    """Tokens (padding inside attention included) that go through the model at once."""
    keep_every: int | None = None
    """Iterations between models that are kept under `iterations/`, for curves of quality against KL."""
    checkpoint_every: int = 10
    """Iterations between checkpoints."""

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.batch_size % self.minibatches:
            raise ConfigError(f"batch_size {self.batch_size} is not a multiple of minibatches {self.minibatches}.")
        if self.decoding.greedy:
            raise ConfigError("decoding is greedy, but policy gradients need sampled responses; set greedy = false.")
        if self.decoding.stop_texts:
            raise ConfigError(
                "decoding.stop_texts ends responses without the end token, which PPO credits and the reward model "
                "reads; leave it out."
            )
        if self.old_logprobs == "sampler" and "bfloat16" in (self.policy.precision, self.decoding.precision):
            raise ConfigError("old_logprobs = 'sampler' needs precision = 'float32'; in bf16 the two differ too much.")
        for name, optimizer in (("policy", self.policy), ("value", self.value)):
            if optimizer.warmup_steps:
                raise ConfigError(
                    f"{name}.warmup_steps is {optimizer.warmup_steps}, but in PPO warmup_iterations says how long "
                    f"rates rise; set that, and leave {name}.warmup_steps out."
                )
        if self.adaptive_kl is not None:
            self._check_adaptive_kl(self.adaptive_kl)
        if self.value_function == "shared" and self.value != VALUE_OPTIMIZER:
            raise ConfigError(
                "value_function = 'shared' trains the value head by the policy's optimizer; leave value out, and set "
                "policy and value_coef."
            )
        if self.lora is not None and self.value_function == "shared":
            raise ConfigError("value_function = 'shared' cannot train a frozen trunk; use 'separate' with lora.")

    def _check_adaptive_kl(self, adaptive: AdaptiveKl) -> None:
        """An iteration multiplies kl_coef by 1 - 0.2 batch_size / horizon at least, which has to stay above 0."""
        if self.batch_size >= 5 * adaptive.horizon:
            raise ConfigError(
                f"adaptive_kl.horizon is {adaptive.horizon}, but one iteration of batch_size {self.batch_size} could "
                f"turn the penalty's sign; give a horizon above batch_size / 5 = {self.batch_size / 5:g}."
            )
        if self.kl_coef == 0:
            raise ConfigError("kl_coef is 0, which adaptive_kl multiplies and never moves; give a kl_coef above 0.")

    def _check_ranges(self) -> None:
        check_range(self, "iterations", "batch_size", "minibatches", "inner_epochs", "microbatch_tokens", least=1)
        check_range(self, "keep_every", "checkpoint_every", least=1)
        check_range(self, "max_text_tokens", least=2)  # a piece's first token is not predicted
        check_range(self, "clip", "value_clip", "ptx_examples_per_episode", above=0)
        check_range(self, "kl_coef", "ptx_coef", "truncation_penalty", "value_coef", "warmup_iterations", least=0)
        check_range(self, "gamma", "lam", "ema_decay", least=0, most=1)

    @property
    def steps_per_iteration(self) -> int:
        return self.minibatches * self.inner_epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig:
    """DPO. The defaults are the paper's, with Adam in place of RMSprop."""

    kind: Literal["dpo"] = "dpo"
    init: str
    """What DPO starts from and is held to: in a recipe an SFT variant or "base", alone a model."""
    part: Part = "all"
    """Which training prompts to learn from: not those of a reward model that is to judge the result."""
    beta: float = 0.1
    """How strongly the policy is held to where it started."""
    variant: Literal["sigmoid", "ipo"] = "sigmoid"
    """The loss: DPO's own, or IPO's square."""
    label_smoothing: float = 0.0
    """The share of pairs taken to be labelled wrongly (conservative DPO)."""
    epochs: int = 1
    """Passes over the pairs."""
    batch_size: int = 64
    """Pairs in an optimizer step."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, warmup_steps=150, schedule="constant")
    """AdamW and its schedule."""
    max_prompt_tokens: int | None = None
    """The longest prompt that is learned from; a longer one loses its beginning (None: all of every prompt)."""
    microbatch_tokens: int = 8192
    """Tokens (padding inside attention included) that go through the model at once."""
    checkpoint_every: int = 50
    """Optimizer steps between checkpoints."""

    def __post_init__(self) -> None:
        check_range(self, "epochs", "batch_size", "microbatch_tokens", "checkpoint_every", "max_prompt_tokens", least=1)
        check_range(self, "beta", above=0)
        check_range(self, "label_smoothing", least=0, below=0.5)
        if self.label_smoothing and self.variant == "ipo":
            raise ConfigError("label_smoothing is a variant of the sigmoid loss; leave it at 0 with variant = 'ipo'.")
