"""Seconds by kind of kernel in one step, by PyTorch's profiler: what the time of a phase is made of."""

from __future__ import annotations

from collections import defaultdict

from torch.profiler import ProfilerActivity, profile

# The first kind one of whose words is in an operator's name takes its time.
KINDS = (
    ("optimizer", ("adam", "linalg_vector_norm", "_foreach", "clip_grad")),
    ("attention", ("bmm", "softmax_backward", "aten::_softmax", "scaled_dot_product", "flash_attention", "_Products")),
    ("matrix products", ("aten::mm", "addmm", "linear", "matmul", "mkldnn")),
    ("log-probs", ("logsumexp", "log_softmax", "gather", "scatter", "aten::exp", "cumsum", "searchsorted", "amax")),
    ("copies and types", ("copy_", "index", "aten::cat", "aten::_to_copy", "clone", "contiguous", "fill_", "zero_")),
    ("element by element", ("aten::mul", "aten::add", "aten::silu", "rsqrt", "pow", "aten::sum", "mean", "div", "neg")),
)
REST = "rest"


def kind_of(name: str) -> str:
    """The kind of kernel that an operator is."""
    return next((kind for kind, words in KINDS if any(word in name for word in words)), REST)


class KernelProfiler:
    """Watches one step."""

    def start(self) -> None:
        self._watch = profile(activities=[ProfilerActivity.CPU])
        self._watch.start()

    def stop(self) -> dict[str, float]:
        self._watch.stop()
        seconds: defaultdict[str, float] = defaultdict(float)
        for event in self._watch.key_averages():
            seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        return dict(seconds)
