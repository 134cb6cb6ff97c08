"""What an adapter gains and costs, by hand."""

import numpy as np
import pytest

from visbio_diffusers.evaluation.tuning import compare, diversity, gain, render_tuning, share_right


def test_gain_is_paired_and_its_error_counts_prompts():
    base, tuned = np.array([0, 0, 1, 1.0]), [np.array([1, 1, 1, 1.0]), np.array([1, 0, 1, 1.0])]
    found = gain(tuned, base, 2)  # the two trainings gain 1 and 0.5 on the first prompt, nothing on the second
    assert found["value"] == pytest.approx(0.375) and found["by_training"] == [0.5, 0.25] and found["n"] == 4
    assert found["standard_error"] == pytest.approx(np.std([0.75, 0], ddof=1) / 2**0.5)


def test_diversity_is_within_prompts():
    features = np.array([[0, 0], [3, 4], [9, 9], [9, 9.0]])
    assert diversity(features, 2) == pytest.approx(2.5)


def test_table_says_what_was_measured():
    rng = np.random.default_rng(0)

    def judged(share):
        right = (rng.random(24) < share).astype(float)
        return {"right": right, "log_prob": -right, "class_right": right[:8], "features": rng.random((24, 3))}

    base, tuned = judged(0.3), [judged(0.9), judged(0.9)]
    found = {"trainings": 2, "minutes": 7.2, "queries": 640, **compare(tuned, base, 4, 2)}
    results = {
        "judge": {"splits": ["val", "test"], "real": share_right(np.array([1, 2, 3]), np.array([1, 2, 0]))},
        "base": {key: float(base[key].mean()) for key in ("right", "class_right")},
        "adapters": {"tuned": found}, "by_subtype": {"band": {"base": 0.25, "tuned": 0.75}}, "command": "python it",
    }  # fmt: skip
    text = render_tuning(results)
    assert "| tuned (2 trainings) |" in text and "| 7 min | 640 |" in text and "| band | 0.25 | 0.75 |" in text
    assert "0.667 of 3 real images" in text and "`python it`" in text
