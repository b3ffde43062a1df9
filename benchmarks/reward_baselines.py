"""How much of a reward model's accuracy does a bag of words reach? Paired, on the same held-out pairs.

    python benchmarks/reward_baselines.py OUT/round-1 [REWARD VARIANT ...]

Trains a TF-IDF logistic regression on the differences of the training pairs (the baseline of `docs/real-run.md`), and
compares it with each reward variant pair by pair: accuracy with Wilson interval, exact McNemar test, and accuracy where
the preferred response is the shorter and where it is the longer one. Prints a Markdown table and a JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from tastemaker.files import read_rankings
from tastemaker.intervals import wilson
from tastemaker.records import Ranking
from tastemaker.statistics import mcnemar

Pair = tuple[str, str]  # the better response, the worse one


def pairs_of(rankings: list[Ranking]) -> list[Pair]:
    """Every untied pair of different texts, better first, in the order in which reward models list theirs."""
    pairs = []
    for ranking in rankings:
        ranks = ranking.ranks
        for better, rank in enumerate(ranks):
            for worse, other in enumerate(ranks):
                first, second = ranking.responses[better].text, ranking.responses[worse].text
                if rank < other and first != second:
                    pairs.append((first, second))
    return pairs


def bag_of_words(train: list[Pair], test: list[Pair]) -> np.ndarray:
    """Whether logistic regression on TF-IDF differences prefers the better response of each test pair."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectorizer.fit([text for pair in train for text in pair])
    difference = vectorizer.transform([a for a, _ in train]) - vectorizer.transform([b for _, b in train])
    sign = np.where(np.arange(len(train)) % 2 == 0, 1, -1)  # both classes, without another draw
    model = LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000)
    model.fit(difference.multiply(sign[:, None]).tocsr(), sign)
    held_out = vectorizer.transform([a for a, _ in test]) - vectorizer.transform([b for _, b in test])
    return np.asarray(held_out @ model.coef_[0] > 0)


def row(name: str, correct: np.ndarray, baseline: np.ndarray, shorter: np.ndarray) -> dict[str, object]:
    """The figures of one model."""
    estimate = wilson(float(correct.sum()), len(correct))
    test = mcnemar(correct.tolist(), baseline.tolist())
    return {
        "model": name,
        "n": len(correct),
        "accuracy": round(float(correct.mean()), 4),
        "wilson95": [round(estimate.ci95.low, 4), round(estimate.ci95.high, 4)],
        "mcnemar_p_against_tfidf": test.p_value,
        "where_better_is_shorter": round(float(correct[shorter].mean()), 4),
        "where_better_is_longer": round(float(correct[~shorter].mean()), 4),
    }


def main(folder: Path, variants: list[str]) -> None:
    """Print the table and the same figures as JSON."""
    test = pairs_of(read_rankings(folder / "4-comparisons/test.jsonl"))
    train = pairs_of(read_rankings(folder / "4-comparisons/train.jsonl"))
    shorter = np.array([len(better) < len(worse) for better, worse in test])
    baseline = bag_of_words(train, test)
    rows = [row("TF-IDF logistic regression", baseline, baseline, shorter)]
    rows.append(row("prefer the shorter", shorter, baseline, shorter))
    for variant in variants or sorted(path.name for path in (folder / "5-reward").iterdir()):
        lines = (folder / "5-reward" / variant / "pairs.jsonl").read_text("utf-8").splitlines()
        scored = [json.loads(line) for line in lines]
        if [(one["better"], one["worse"]) for one in scored] != test:
            raise SystemExit(f"{variant} was measured on other pairs than 4-comparisons/test.jsonl holds")
        rows.append(row(variant, np.array([one["gap"] > 0 for one in scored]), baseline, shorter))
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for one in rows:
        print("| " + " | ".join(str(value) for value in one.values()) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
