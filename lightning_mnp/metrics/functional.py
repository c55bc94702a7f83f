"""The metrics as pure functions, with the checks that functions and classes share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_mnp.mnp.detection_ratio import detection_ratio as ratio_of_correlations
from lightning_mnp.mnp.detection_ratio import mean_rank_correlation, rank_correlation

__all__ = [
    "attack_success_rate",
    "clean_accuracy",
    "detection_rate",
    "detection_ratio",
    "false_positive_rate",
    "spearman",
]

Verdicts = Tensor | Sequence[bool] | Sequence[str]

_VERDICTS = {"clean": 0, "backdoored": 1, "undecided": 2}


def attack_success_rate(preds: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    r"""Share of triggered images that get the attacker's label, ASR.

    .. math:: \frac{|\{i : \hat y_i = t_i, t_i \ne y_i\}|}{|\{i : t_i \ne y_i\}|}

    Images whose true label :math:`y_i` is the attacker's label :math:`t_i` do not count.

    Args:
        preds: Predictions for triggered images: logits or probabilities, shape (N, K), or
            classes, shape (N,), integers.
        targets: The attacker's labels, shape (N,), integers.
        labels: The true labels, shape (N,), integers.

    Returns:
        The share, from 0 to 1; NaN, with a warning, if no image counts.

    Raises:
        ValueError: If shapes or dtypes are others.

    Example:
        >>> preds, labels = torch.tensor([0, 0, 2, 0]), torch.tensor([1, 2, 2, 0])
        >>> attack_success_rate(preds, torch.zeros(4, dtype=torch.long), labels)
        tensor(0.6667)
    """
    return _share(*_attack_success_update(preds, targets, labels), "triggered image")


def clean_accuracy(preds: Tensor, labels: Tensor) -> Tensor:
    """Share of clean images that get their true label, CA.

    Args:
        preds: Predictions for clean images: logits or probabilities, shape (N, K), or classes,
            shape (N,), integers.
        labels: The true labels, shape (N,), integers.

    Returns:
        The share, from 0 to 1; NaN, with a warning, if there is no image.

    Raises:
        ValueError: If shapes or dtypes are others.

    Example:
        >>> clean_accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        tensor(0.5000)
    """
    return _share(*_clean_accuracy_update(preds, labels), "image")


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation; tied values share the mean of their ranks.

    Args:
        x: Shape (N,), finite.
        y: Shape (N,), finite.

    Returns:
        The correlation, from -1 to 1, float32; NaN if all values of ``x`` or of ``y`` are equal
        or there are fewer than two.

    Raises:
        ValueError: If shapes differ or a value is not finite.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 9.0, 5.0]))
        tensor(0.5000)
    """
    _check_pair(x, y, "x", "y")
    return torch.tensor(_correlation(x, y), device=x.device)


def detection_ratio(
    magnitude: Tensor,
    saliency: Tensor,
    suppressed_magnitude: Tensor,
    suppressed_saliency: Tensor,
    layers: Tensor | None = None,
) -> Tensor:
    r"""How much of the magnitude-saliency correlation survives clean suppression, Eq. 8.

    .. math:: \rho(F, \theta_s) / \rho(F, \theta)

    With ``layers``, :math:`\rho` is Spearman's correlation within each layer, averaged by numbers
    of filters, as an audit has it by default; layers of fewer than four filters do not count.
    Without them, it is that of all filters together, as the paper has it.

    Args:
        magnitude: Magnitudes of the network's filters (Eq. 12), shape (filters,).
        saliency: Saliencies of the same filters (Eq. 13), shape (filters,).
        suppressed_magnitude: Magnitudes in the suppressed network, shape (filters,).
        suppressed_saliency: Saliencies in the suppressed network, shape (filters,).
        layers: The number of each filter's layer, shape (filters,), integers in any order; None
            for the correlation of all filters together.

    Returns:
        The ratio, float32. Low values speak for a backdoor. It means something only if the
        correlation of the network itself is clearly above 0. NaN, with a warning, if that is 0 or
        one of the two correlations is not defined.

    Raises:
        ValueError: If shapes differ, a value is not finite, or layers are not integers.

    Example:
        >>> magnitude = torch.tensor([1.0, 2.0, 3.0])
        >>> detection_ratio(magnitude, magnitude, magnitude, torch.tensor([2.0, 9.0, 5.0]))
        tensor(0.5000)
    """
    _check_pair(magnitude, saliency, "magnitude", "saliency")
    _check_pair(
        suppressed_magnitude, suppressed_saliency, "suppressed_magnitude", "suppressed_saliency"
    )
    if layers is not None:
        _check_layers(layers, magnitude)
        _check_layers(layers, suppressed_magnitude)
    original = _correlation(magnitude, saliency, layers)
    suppressed = _correlation(suppressed_magnitude, suppressed_saliency, layers)
    ratio = ratio_of_correlations(suppressed, original)
    if math.isnan(ratio):
        rank_zero_warn(
            f"The detection ratio is not defined for correlations of {suppressed:.3g} "
            f"(suppressed) and {original:.3g} (original); the result is NaN.",
            UserWarning,
        )
    return torch.tensor(ratio, device=magnitude.device)


def detection_rate(verdicts: Verdicts, truths: Verdicts) -> Tensor:
    """Share of networks that are judged correctly, DR.

    Args:
        verdicts: One for each network: True if it is judged backdoored, or ``"clean"``,
            ``"backdoored"``, ``"undecided"``. An undecided one counts as wrong.
        truths: True if the network is backdoored, or ``"clean"``, ``"backdoored"``.

    Returns:
        The share, from 0 to 1; NaN, with a warning, if there is no network.

    Raises:
        ValueError: If lengths differ or a value is none of these.

    Example:
        >>> detection_rate(["backdoored", "undecided"], ["backdoored", "clean"])
        tensor(0.5000)
    """
    return _share(*_detection_rate_update(verdicts, truths), "network")


def false_positive_rate(verdicts: Verdicts, truths: Verdicts) -> Tensor:
    """Share of clean networks that are judged backdoored.

    Args:
        verdicts: As in :func:`detection_rate`; an undecided one is no false alarm.
        truths: As in :func:`detection_rate`.

    Returns:
        The share, from 0 to 1; NaN, with a warning, if there is no clean network.

    Raises:
        ValueError: If lengths differ or a value is none of these.

    Example:
        >>> false_positive_rate([True, False, True], [False, False, True])
        tensor(0.5000)
    """
    return _share(*_false_positive_update(verdicts, truths), "clean network")


def _attack_success_update(preds: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _check_classes(targets, "targets")
    _check_classes(labels, "labels")
    if targets.shape != labels.shape:
        raise ValueError(
            f"Expected arguments `targets` and `labels` to have the same shape, but got "
            f"{tuple(targets.shape)} and {tuple(labels.shape)}."
        )
    counted = targets != labels
    return ((_classes(preds, targets) == targets) & counted).sum(), counted.sum()


def _clean_accuracy_update(preds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _check_classes(labels, "labels")
    hits = (_classes(preds, labels) == labels).sum()
    return hits, torch.full_like(hits, labels.numel())


def _detection_rate_update(verdicts: Verdicts, truths: Verdicts) -> tuple[Tensor, Tensor]:
    verdict, truth = _codes(verdicts, truths)
    return (verdict == truth).sum(), torch.tensor(len(truth))


def _false_positive_update(verdicts: Verdicts, truths: Verdicts) -> tuple[Tensor, Tensor]:
    verdict, truth = _codes(verdicts, truths)
    clean = truth == _VERDICTS["clean"]
    return ((verdict == _VERDICTS["backdoored"]) & clean).sum(), clean.sum()


def _share(hits: Tensor, total: Tensor, noun: str) -> Tensor:
    if total == 0:
        rank_zero_warn(f"Not one {noun} counts, so the share is NaN.", UserWarning)
        return torch.full_like(hits, float("nan"), dtype=torch.float32)
    # In double precision on the CPU, which not every other device has.
    return (hits.cpu().double() / total.cpu()).float().to(hits.device)


def _correlation(x: Tensor, y: Tensor, layers: Tensor | None = None) -> float:
    # On the CPU, since not every device has double precision.
    first, second = (value.detach().cpu().double() for value in (x, y))
    if layers is None:
        return rank_correlation(first, second) if len(x) > 1 else math.nan
    order = layers.cpu().argsort(stable=True)
    sizes = layers.cpu().unique(return_counts=True)[1].tolist()
    return mean_rank_correlation(first[order], second[order], sizes)


def _check_layers(layers: Tensor, magnitude: Tensor) -> None:
    _check_classes(layers, "layers")
    if layers.shape != magnitude.shape:
        raise ValueError(
            f"Expected argument `layers` to have the shape ({len(magnitude)},), one number for "
            f"each filter, but got {tuple(layers.shape)}."
        )


def _check_classes(values: Tensor, name: str) -> None:
    if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(
            f"Expected argument `{name}` to be integers of shape (N,), but got {values.dtype} of "
            f"shape {tuple(values.shape)}."
        )


def _classes(preds: Tensor, labels: Tensor) -> Tensor:
    if preds.is_floating_point() and preds.ndim == 2 and len(preds) == len(labels):
        undefined = preds.isnan().any(1)
        if undefined.any():  # argmax would take them for the first NaN's class
            rank_zero_warn(
                f"{int(undefined.sum())} of {len(preds)} images have NaN logits and count as "
                "misses.",
                UserWarning,
            )
        return preds.argmax(1).masked_fill(undefined, -1)
    if preds.is_floating_point() or preds.dtype == torch.bool or preds.shape != labels.shape:
        count = len(labels)
        raise ValueError(
            f"Expected argument `preds` to be logits of shape ({count}, K) or integers of shape "
            f"({count},), but got {preds.dtype} of shape {tuple(preds.shape)}."
        )
    return preds


def _check_pair(x: Tensor, y: Tensor, name_x: str, name_y: str) -> None:
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"Expected arguments `{name_x}` and `{name_y}` to have the same shape (N,), but got "
            f"{tuple(x.shape)} and {tuple(y.shape)}."
        )
    for name, value in ((name_x, x), (name_y, y)):
        if not value.isfinite().all():
            raise ValueError(
                f"Expected argument `{name}` to be finite, but "
                f"{int((~value.isfinite()).sum())} of {value.numel()} values are not."
            )


def _codes(verdicts: Verdicts, truths: Verdicts) -> tuple[Tensor, Tensor]:
    verdict = _encode(verdicts, "verdicts", list(_VERDICTS))
    truth = _encode(truths, "truths", ["clean", "backdoored"])
    if len(verdict) != len(truth):
        raise ValueError(
            f"Expected arguments `verdicts` and `truths` to have the same length, but got "
            f"{len(verdict)} and {len(truth)}."
        )
    return verdict, truth


def _encode(values: Verdicts, name: str, words: list[str]) -> Tensor:
    if isinstance(values, str) or (isinstance(values, Tensor) and values.ndim != 1):
        raise ValueError(
            f"Expected argument `{name}` to have one value for each network, but got {values!r}."
        )
    codes = []
    for value in values.tolist() if isinstance(values, Tensor) else values:
        if isinstance(value, bool):
            codes.append(int(value))
        elif isinstance(value, str) and value in words:
            codes.append(_VERDICTS[value])
        else:
            raise ValueError(
                f"Expected argument `{name}` to hold booleans or strings out of {words}, but got "
                f"{value!r}."
            )
    return torch.tensor(codes, dtype=torch.long)
