"Measures of columns: what holds whatever the numbers, several seeds, and bad input."

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from cmi_mtl import metrics
from cmi_mtl.core import InputError

NOTHING = {"mean": None, "low": None, "high": None, "n": 0}


@pytest.fixture(scope="module")
def run():
    "Columns of three seeds on 40 pictures with 5 questions each, two of these linked."
    rng = np.random.default_rng(0)
    pictures = np.repeat([f"picture {i}" for i in range(40)], 5)
    sure = rng.beta(4, 1, (3, 200)).round(2)  # rounded: many are equal
    correct = (rng.random((3, 200)) < sure - 0.1).astype(int)
    linked = [f"group {i // 5}" if i % 5 < 2 else None for i in range(200)]
    return {
        "pictures": pictures,
        "confidence": sure,
        "correct": correct,
        "linked": linked,
        "changed": rng.integers(2, size=(3, 200)),
    }


MEASURES = {
    "mean": lambda r: metrics.mean_interval(r["correct"], r["pictures"]),
    "sign flips": lambda r: metrics.sign_flip_test(r["correct"] - r["changed"], r["pictures"]),
    "calibration": lambda r: metrics.calibration(r["confidence"], r["correct"], r["pictures"]),
    "reliability": lambda r: metrics.reliability(r["confidence"], r["correct"], r["pictures"]),
    "coverage": lambda r: metrics.accuracy_by_coverage(r["confidence"], r["correct"]),
    "area": lambda r: metrics.aurc_interval(r["confidence"], r["correct"], r["pictures"], draws=50),
    "reliance": lambda r: metrics.visual_reliance(r["correct"], r["changed"], r["pictures"]),
    "consistency": lambda r: metrics.consistency(r["correct"], r["linked"], r["pictures"]),
}
each_measure = pytest.mark.parametrize("name", MEASURES)


def numbers(found):
    "All numbers that a measure gives, in order; those drawn with the order of questions left out."
    if isinstance(found, dict):
        drawn = ("floor", "p") if "p" in found or "floor" in found else ()
        return np.concatenate([numbers(v) for k, v in found.items() if k not in drawn])
    if isinstance(found, (list, tuple)):
        return np.concatenate([numbers(x) for x in found])
    return np.atleast_1d(np.asarray(found, dtype=float))


def taken(run, rows=slice(None), seeds=slice(None)):
    "The run with some of its questions and seeds, in that order."
    out = {}
    for name, x in run.items():
        x = np.asarray(x, dtype=object) if name == "linked" else np.asarray(x)
        out[name] = x[seeds][..., rows] if x.ndim == 2 else x[rows]
    return out


@each_measure
def test_order_of_questions_does_not_count(run, name):
    order = np.random.default_rng(1).permutation(200)
    one, other = (numbers(MEASURES[name](r)) for r in (run, taken(run, order)))
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@each_measure
def test_columns_of_one_seed_need_no_second_axis(run, name):
    flat, deep = (numbers(MEASURES[name](taken(run, seeds=s))) for s in (0, [0]))
    np.testing.assert_allclose(flat, deep, rtol=1e-9)


@pytest.mark.parametrize("name", [n for n in MEASURES if n not in ("area", "reliability")])
def test_of_several_seeds_the_mean_is_taken(run, name):
    def estimates(found):
        "What is no end of an interval: all but low and high."
        if not isinstance(found, dict):
            return [np.asarray(found, dtype=float)]
        skipped = ("low", "high", "p", "floor")
        return [x for k, v in found.items() if k not in skipped for x in estimates(v)]

    together = estimates(MEASURES[name](run))
    single = [estimates(MEASURES[name](taken(run, seeds=[k]))) for k in range(3)]
    for i, whole in enumerate(together):
        np.testing.assert_allclose(whole, np.mean([s[i] for s in single], axis=0), rtol=1e-9)


def test_pooled_reliability_counts_every_answer(run):
    rows = metrics.reliability(run["confidence"], run["correct"], run["pictures"], bins=7)
    assert sum(r["n"] for r in rows) == 600 and len(rows) == 7
    assert math.isclose(sum(r["n"] * r["mean"] for r in rows) / 600, run["correct"].mean())
    assert [r["confidence"] for r in rows] == sorted(r["confidence"] for r in rows)
    assert max(r["n"] for r in rows) < 2 * 600 / 7  # of equal mass, but for ties


def test_equal_answers_of_two_models_are_no_difference(run):
    nothing = run["correct"] - run["correct"]
    assert metrics.sign_flip_test(nothing, run["pictures"])["p"] == 1
    assert metrics.mcnemar(run["correct"][0], run["correct"][0])["p_unclustered"] == 1


def test_sign_flips_do_not_ask_which_model_is_first(run):
    gains = run["correct"] - run["changed"]
    one, other = (metrics.sign_flip_test(g, run["pictures"]) for g in (gains, -gains))
    assert one["p"] == other["p"] and one["mean"] == -other["mean"] and one["clusters"] == 40


def test_holm_keeps_order_and_never_lowers():
    p = {f"test {i}": x for i, x in enumerate(np.random.default_rng(0).random(9) ** 3)}
    adjusted = metrics.holm(p)
    assert list(adjusted) == list(p) and all(p[k] <= adjusted[k] <= 1 for k in p)
    rank = spearmanr(list(p.values()), list(adjusted.values())).statistic
    assert rank > 0.9 and math.isclose(min(adjusted.values()), 9 * min(p.values()))


def test_coverage_ends_at_the_accuracy_and_lies_between_best_and_worst(run):
    found = metrics.accuracy_by_coverage(run["confidence"], run["correct"])
    ends = [found[k][-1] for k in ("model", "best", "random")]
    np.testing.assert_allclose(ends, run["correct"].mean())
    worst = metrics.accuracy_by_coverage(-run["correct"], run["correct"])["aurc"]["model"]
    assert found["aurc"]["best"] <= found["aurc"]["model"] < found["aurc"]["random"] < worst


def test_constant_confidence_has_an_interval(run):
    low, high = metrics.aurc_interval(np.ones((3, 200)), run["correct"], run["pictures"], draws=50)
    assert low < 1 - run["correct"].mean() < high


def test_without_groups_consistency_says_nothing(run):
    found = metrics.consistency(run["correct"], [None] * 200, run["pictures"])
    assert found["all_right"] == found["same"] == NOTHING and found["same_if_independent"] is None


def changed(run, **columns):
    return {**run, **columns}


HOLE = [1, math.nan] + [1] * 198


@pytest.mark.parametrize(
    "name, bad, said",
    [
        ("mean", {"pictures": ["a"] * 199}, r"clusters: shape \(3, 199\), not \(3, 200\)"),
        ("mean", {"correct": [HOLE] * 3}, "values: a value is missing"),
        (
            "sign flips",
            {"correct": np.full((3, 200), math.nan)},
            "gains of one pair: a value is missing",
        ),
        (
            "calibration",
            {"confidence": np.full((3, 200), 1.5)},
            "confidence: a value outside 0 to 1",
        ),
        ("calibration", {"correct": np.full((3, 200), 0.5)}, "correct: a value is neither 0 nor 1"),
        ("reliability", {"confidence": np.full((3, 200), -0.1)}, "confidence: a value outside"),
        (
            "coverage",
            {"confidence": np.ones((2, 200))},
            r"correct: shape \(3, 200\), not \(2, 200\)",
        ),
        ("coverage", {"confidence": [], "correct": []}, "score: no question"),
        ("area", {"pictures": ["a"]}, "clusters: shape"),
        ("reliance", {"changed": [HOLE] * 3}, "changed: a value is missing"),
        ("reliance", {"changed": np.full((3, 200), 100)}, "changed: a value is neither 0 nor 1"),
        ("consistency", {"linked": [None]}, "linked: shape"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(run, name, bad, said):
    with pytest.raises(InputError, match=said):
        MEASURES[name](changed(run, **bad))


def test_mcnemar_is_of_one_seed(run):
    with pytest.raises(InputError, match="one: several seeds"):
        metrics.mcnemar(run["correct"], run["changed"])
