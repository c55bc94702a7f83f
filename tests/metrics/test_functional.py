from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, confusion_matrix
from torch import Tensor

from lightning_mnp.metrics import (
    attack_success_rate,
    clean_accuracy,
    detection_rate,
    detection_ratio,
    false_positive_rate,
    spearman,
)


def classes(count: int, seed: int, num_classes: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_classes, (count,), generator=generator)


def values(count: int, seed: int, ties: bool = False) -> Tensor:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return (drawn * 6).round() if ties else drawn


@pytest.mark.parametrize("all_to_all", [True, False])
def test_attack_success_rate_equals_accuracy_on_the_images_that_count(all_to_all: bool) -> None:
    preds, labels = classes(200, 0), classes(200, 1)
    targets = (labels + 1) % 4 if all_to_all else torch.full_like(labels, 2)
    counted = (targets != labels).numpy()

    rate = attack_success_rate(preds, targets, labels)

    wanted = accuracy_score(targets.numpy()[counted], preds.numpy()[counted])
    assert float(rate) == pytest.approx(wanted)
    logits = torch.nn.functional.one_hot(preds, 4).float() - 5
    assert attack_success_rate(logits, targets, labels) == rate


def test_images_of_the_target_class_do_not_count() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    assert attack_success_rate(torch.zeros(4).long(), torch.zeros(4).long(), labels) == 1.0
    wrong = torch.tensor([0, 0, 0, 1])
    assert attack_success_rate(wrong, torch.zeros(4).long(), labels) == 0.0


def test_clean_accuracy_equals_scikit_learn() -> None:
    preds, labels = classes(300, 2), classes(300, 3)
    wanted = accuracy_score(labels.numpy(), preds.numpy())
    assert float(clean_accuracy(preds, labels)) == pytest.approx(wanted)
    logits = torch.nn.functional.one_hot(preds, 4).float()
    assert float(clean_accuracy(logits, labels)) == pytest.approx(wanted)


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("count", [2, 3, 50, 2000])
def test_spearman_equals_scipy(count: int, scale: float, ties: bool) -> None:
    x, y = values(count, 1, ties) * scale, values(count, 2, ties) * scale
    wanted = spearmanr(x.numpy(), y.numpy()).statistic
    assert float(spearman(x, y)) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("x", [torch.ones(4), torch.ones(1), torch.ones(0), torch.zeros(4)])
def test_spearman_of_constants_is_not_defined(x: Tensor) -> None:
    y = torch.arange(float(len(x)))
    assert spearman(x, y).isnan()
    assert spearman(y, x).isnan()


@pytest.mark.parametrize("ties", [True, False])
def test_detection_ratio_equals_scipy(ties: bool) -> None:
    parts = [values(500, seed, ties) for seed in range(4)]
    parts[1] = parts[1] + parts[0]
    original, suppressed = (
        spearmanr(parts[place].numpy(), parts[place + 1].numpy()).statistic for place in (0, 2)
    )
    assert float(detection_ratio(*parts)) == pytest.approx(suppressed / original, rel=1e-4)


def test_detection_ratio_within_layers_equals_scipy() -> None:
    parts = [values(40, seed) for seed in range(4)]
    parts[1], parts[3] = parts[1] + parts[0], parts[3] + parts[2]
    layers = torch.tensor([7] * 20 + [3] * 10 + [5] * 3 + [0] * 7)  # three filters say nothing
    correlations = []
    for place in (2, 0):
        found = []
        for layer in (7, 3, 0):
            x, y = (parts[place + more][layers == layer].numpy() for more in (0, 1))
            found.append(len(x) * spearmanr(x, y).statistic)
        correlations.append(sum(found) / 37)
    ratio = detection_ratio(*parts, layers)
    assert float(ratio) == pytest.approx(correlations[0] / correlations[1], rel=1e-4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(9))
    assert detection_ratio(*(part[order] for part in parts), layers[order]) == ratio


def test_detection_ratio_does_not_depend_on_scale() -> None:
    parts = [values(50, seed) for seed in range(4)]
    scaled = [parts[0] * 100, parts[1] ** 3, parts[2].exp(), parts[3] / 7]
    assert detection_ratio(*parts) == detection_ratio(*scaled)


@pytest.mark.parametrize(
    ("original", "suppressed"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]),
        ([1.0, 2.0, 1.0], [1.0, 2.0, 3.0]),
    ],
)
def test_an_undefined_ratio_is_nan(original: list[float], suppressed: list[float]) -> None:
    ranks = torch.arange(3.0)
    with pytest.warns(UserWarning, match="detection ratio is not defined for correlations of"):
        ratio = detection_ratio(ranks, torch.tensor(original), ranks, torch.tensor(suppressed))
    assert ratio.isnan()


def test_rates_of_detection_equal_scikit_learn() -> None:
    verdicts, truths = classes(100, 4, 2).bool(), classes(100, 5, 2).bool()
    (negative, false), (missed, positive) = confusion_matrix(truths.numpy(), verdicts.numpy())

    for wrap in (lambda x: x, lambda x: x.tolist(), words):
        rate = detection_rate(wrap(verdicts), wrap(truths))
        assert float(rate) == pytest.approx((negative + positive) / 100)
        rate = false_positive_rate(wrap(verdicts), wrap(truths))
        assert float(rate) == pytest.approx(false / (false + negative))
    assert missed > 0


def words(flags: Tensor) -> list[str]:
    return ["backdoored" if flag else "clean" for flag in flags.tolist()]


def test_undecided_is_wrong_but_no_false_alarm() -> None:
    verdicts = ["undecided", "undecided", "backdoored", "clean"]
    truths = ["clean", "backdoored", "clean", "clean"]
    assert detection_rate(verdicts, truths) == 0.25
    assert float(false_positive_rate(verdicts, truths)) == pytest.approx(1 / 3)


NONE = torch.zeros(0).long()


@pytest.mark.parametrize(
    ("function", "arguments", "noun"),
    [
        (attack_success_rate, (torch.ones(3).long(),) * 3, "triggered image"),
        (clean_accuracy, (NONE, NONE), "image"),
        (detection_rate, ([], []), "network"),
        (false_positive_rate, ([True], [True]), "clean network"),
    ],
)
def test_a_share_of_nothing_is_nan(
    function: Callable[..., Tensor], arguments: tuple[Any, ...], noun: str
) -> None:
    with pytest.warns(UserWarning, match=f"Not one {noun} counts"):
        assert math.isnan(function(*arguments))


ONES = torch.ones(3).long()


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (attack_success_rate, (ONES, ONES.float(), ONES), "`targets` to be integers .*float32"),
        (attack_success_rate, (ONES, ONES, ONES[None]), r"`labels` to be integers .*\(1, 3\)"),
        (attack_success_rate, (ONES, ONES, ONES[:2]), r"`targets` and `labels` .*\(3,\) and \(2,"),
        (attack_success_rate, (ONES[:2], ONES, ONES), r"`preds` .*\(3, K\) .*\(3,\), but .*\(2,\)"),
        (clean_accuracy, (ONES.float(), ONES), "`preds` to be logits .* torch.float32"),
        (clean_accuracy, (torch.zeros(2, 4), ONES), r"`preds` to be logits .* \(2, 4\)"),
        (clean_accuracy, (ONES.bool(), ONES), "`preds` .* torch.bool"),
        (clean_accuracy, (ONES, ONES.bool()), "`labels` to be integers .* torch.bool"),
        (spearman, (torch.ones(3), torch.ones(4)), r"`x` and `y` .* \(3,\) and \(4,\)"),
        (spearman, (torch.ones(3, 1), torch.ones(3, 1)), r"`x` and `y` .* \(3, 1\)"),
        (
            spearman,
            (torch.ones(3), torch.tensor([1.0, math.nan, math.inf])),
            "`y` to be finite, but 2 of 3",
        ),
        (detection_ratio, (*[torch.ones(3)] * 4, ONES.float()), "`layers` to be integers"),
        (detection_ratio, (*[torch.ones(3)] * 4, ONES[:2]), r"`layers` .* \(3,\), .* got \(2,\)"),
        (detection_rate, ([True], [True, False]), "the same length, but got 1 and 2"),
        (detection_rate, (["maybe"], [True]), "`verdicts` to hold booleans or .* got 'maybe'"),
        (detection_rate, ([True], ["undecided"]), "`truths` to hold .* got 'undecided'"),
        (detection_rate, ("clean", [True]), "`verdicts` to have one value for each .* 'clean'"),
        (detection_rate, (torch.tensor(True), [True]), "`verdicts` to have one value for each"),
        (detection_rate, (torch.tensor([0.7]), [True]), r"`verdicts` to hold .* got 0\.\d+"),
    ],
)
def test_errors(function: Callable[..., Tensor], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize("label", [0, 1])
def test_undefined_logits_are_misses(label: int) -> None:
    """Not hits of class 0, where argmax finds the first NaN."""
    logits = torch.tensor([[math.nan, math.nan], [1.0, 0.0], [0.0, 1.0], [0.0, math.nan]])
    labels = torch.full((4,), label)
    with pytest.warns(UserWarning, match="2 of 4 images have NaN logits and count as misses"):
        assert clean_accuracy(logits, labels) == 0.25
    with pytest.warns(UserWarning, match="NaN logits"):
        assert attack_success_rate(logits, labels, 1 - labels) == 0.25
