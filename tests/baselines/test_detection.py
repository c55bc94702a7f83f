from __future__ import annotations

from lightning_mnp.baselines import DetectionResult


def test_a_network_is_backdoored_above_the_threshold_only() -> None:
    verdicts = [DetectionResult(score, 2.0, None, {}).verdict for score in (1.9, 2.0, 2.1)]
    assert verdicts == ["clean", "clean", "backdoored"]


def test_long_lists_are_not_shown() -> None:
    result = DetectionResult(1.0, 2.0, None, {}, suspects=[17], sample_scores=[0.125])
    assert "17" not in repr(result)
    assert "0.125" not in repr(result)
    assert result.details == {}
