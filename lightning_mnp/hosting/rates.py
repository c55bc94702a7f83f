"""Rates: clean accuracy and attack success of a network, where triggered images are at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_mnp.metrics import AttackSuccessRate, CleanAccuracy
from lightning_mnp.surgery.forward import Forward, evaluating

__all__ = ["check_triggered", "find_test_loaders", "measure_hosted_rates", "measure_rates"]

Loaders = tuple[Iterable[Any] | None, Iterable[Any] | None]


def find_test_loaders(datamodule: Any, triggered: Iterable[Any] | None) -> Loaders:
    """Return loaders of clean and of triggered test images; None for what there is not.

    Args:
        datamodule: The Trainer's datamodule, or None. One of this package with an attack has both.
        triggered: A loader of triggered images that was given; it comes first.

    Returns:
        The loader of clean images yields (images, labels), that of triggered images
        (images, attacker's labels, true labels).
    """
    if getattr(datamodule, "triggered_set", None) is None:
        return None, triggered
    clean, own = datamodule.test_dataloader()
    return clean, own if triggered is None else triggered


def measure_rates(
    network: nn.Module,
    forward: Forward,
    loaders: Loaders,
    ending: str,
) -> dict[str, float]:
    """Measure CA and ASR.

    Args:
        network: The network; it is left in the modes that it was in.
        forward: Calls it on images, and returns logits.
        loaders: As :func:`find_test_loaders` returns them.
        ending: What the names end in, such as ``"before"``.

    Returns:
        ``mnp/CA_<ending>`` and ``mnp/ASR_<ending>``, from 0 to 1, for the loaders there are.

    Raises:
        ValueError: If a batch has another form.
    """
    clean, triggered = loaders
    rates = {}
    with evaluating(network), torch.no_grad():
        if clean is not None:
            accuracy = CleanAccuracy()
            for images, labels in _batches(clean, 2):
                accuracy.update(_logits(network, forward, images), labels.cpu())
            rates[f"mnp/CA_{ending}"] = float(accuracy.compute())
        if triggered is not None:
            success = AttackSuccessRate()
            for images, targets, labels in _batches(triggered, 3):
                success.update(_logits(network, forward, images), targets.cpu(), labels.cpu())
            rates[f"mnp/ASR_{ending}"] = float(success.compute())
    return rates


def measure_hosted_rates(
    trainer: Any,
    network: nn.Module,
    forward: Forward,
    triggered: Iterable[Any] | None,
    ending: str,
) -> dict[str, float]:
    """Measure CA and ASR on the images that a Trainer's datamodule or the user gives.

    Random numbers are drawn apart. Under ``fast_dev_run`` nothing is measured.

    Args:
        trainer: The Trainer, whose datamodule may have test images.
        network: See :func:`measure_rates`.
        forward: See :func:`measure_rates`.
        triggered: See :func:`find_test_loaders`.
        ending: See :func:`measure_rates`.

    Returns:
        See :func:`measure_rates`.
    """
    if getattr(trainer, "fast_dev_run", False):
        return {}
    with isolate_rng():
        loaders = find_test_loaders(getattr(trainer, "datamodule", None), triggered)
        return measure_rates(network, forward, loaders, ending)


def check_triggered(loader: Iterable[Any] | None) -> None:
    """Check the first batch of triggered images, before any work.

    Random numbers are drawn apart.

    Args:
        loader: The loader, which can be read more than once; None for none.

    Raises:
        ValueError: If it can be read only once, or yields nothing, or batches of another form.
    """
    if loader is None:
        return
    with isolate_rng():
        batches = iter(loader)
        if batches is loader:  # what is measured after the defense would find it used up
            raise ValueError(
                "Expected argument `triggered_loader` to be a loader that can be read more than "
                f"once, but got an iterator ({type(loader).__name__}), which cannot. Pass a "
                "DataLoader or a list of batches."
            )
        try:
            batch = next(batches)
        except StopIteration:
            raise ValueError(
                "Expected argument `triggered_loader` to yield batches, but it yields none. Pass "
                "a loader that has some, and that can be read more than once."
            ) from None
        _check_batch(batch, 3)


def _batches(loader: Iterable[Any], parts: int) -> Iterator[Any]:
    for batch in loader:
        _check_batch(batch, parts)
        yield batch


def _check_batch(batch: Any, parts: int) -> None:
    listed = isinstance(batch, (list, tuple))
    if listed and len(batch) == parts:
        return
    kind = "triggered" if parts == 3 else "clean"
    form = "(images, attacker's labels, true labels)" if parts == 3 else "(images, labels)"
    found = f"{len(batch)} parts" if listed else type(batch).__name__
    raise ValueError(
        f"Expected the batches of {kind} test images to be {form}, but got {found}. Correct "
        "argument `triggered_loader`, or the datamodule."
    )


def _logits(network: nn.Module, forward: Forward, images: Tensor) -> Tensor:
    parameter = next(network.parameters(), None)
    placed = images if parameter is None else images.to(parameter.device)
    logits: Tensor = forward(network, placed).cpu()
    return logits
