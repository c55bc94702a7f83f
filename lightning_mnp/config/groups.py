"""The options in groups: filters, suppression, masks, pruning and verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_mnp.config.ranges import check_options, option, require
from lightning_mnp.surgery.layers import Site
from lightning_mnp.surgery.masked_network import Statistics

__all__ = [
    "FilterOptions",
    "MaskOptions",
    "PruningOptions",
    "PruningRule",
    "Removal",
    "Saliency",
    "SuppressionOptions",
    "VerdictOptions",
    "VerdictRule",
]

PruningRule = Literal["auto", "count", "share", "threshold"]
Removal = Literal["map", "filter"]
Saliency = Literal["map", "weight"]
VerdictRule = Literal["signals", "ratio"]


@dataclass(frozen=True)
class FilterOptions:
    """Which filters take part, and how they are masked.

    Args:
        include: Name patterns of the layers to take.
        exclude: Name patterns of the layers to leave out.
        linear: Whether hidden linear layers take part, as convolutions with 1x1 kernels. The soft
            masks of the rule `auto` act on all linear layers in any case.
        site: Where a mask acts: `norm`, behind the normalization layer, or `filter`. The latter
            needs `running` statistics for M1 and M2: those of the batch undo such masks.
        statistics: Suppression, saliency and masks normalize by `batch` or `running` statistics.
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    linear: bool = option(False)
    site: Site = option("norm", choices=get_args(Site))
    statistics: Statistics = option("batch", choices=get_args(Statistics))

    def __post_init__(self) -> None:
        check_options(self, "filters")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            listed = not isinstance(patterns, str) and all(isinstance(p, str) for p in patterns)
            require(listed, self, name, "a list of name patterns", "filters")


@dataclass(frozen=True)
class SuppressionOptions:
    """Clean suppression: a copy of the network unlearns the clean task (Eq. 6).

    Args:
        runs: Number of suppression runs, over which masks and the pile-up are averaged. An audit
            makes one, and the others if the verdict hangs on the pile-up or by Eq. 8, or if
            filters are ranked by masks.
        more_runs: Most further runs, made if the verdict hangs on an unclear pile-up.
        lr: Learning rate, eta_1 in the paper.
        momentum: Momentum; above 0 it takes memory for one more copy of the weights.
        epochs: Most passes over the images of a run, T in the paper.
        parts: Each run sees one of so many parts of the defense set, the next run the next one.
        stop_accuracy: A run stops when the accuracy falls to this share; None for all passes.
        mu: Weight of the squared norm (Eq. 6), the same as a weight decay of 2 mu.
    """

    runs: int = option(2, at_least=1)
    more_runs: int = option(6, at_least=0)
    lr: float = option(0.02, above=0)
    momentum: float = option(0.0, at_least=0, below=1)
    epochs: int = option(40, at_least=1)
    parts: int = option(2, at_least=1)
    stop_accuracy: float | None = option(0.2, above=0, below=1, optional=True)
    mu: float = option(0.001, at_least=0)

    def __post_init__(self) -> None:
        check_options(self, "suppression")
        if 2 * self.mu * self.lr >= 1:
            raise ValueError(
                f"Expected 2 * `suppression.mu` * `suppression.lr` to be below 1, or a step of "
                f"weight decay takes all of the weights, but got `mu` = {self.mu!r} and `lr` = "
                f"{self.lr!r}. Lower one of them."
            )


@dataclass(frozen=True)
class MaskOptions:
    """The dual masks M1 and M2 (Eq. 5 and 7); the pruning rule `auto` makes none.

    Args:
        lr: Learning rate of both masks, eta_2 in the paper.
        momentum: Momentum of both masks.
        epochs: Passes over the defense set.
        penalty: Weight of the magnitude term of both masks, lambda in the paper.
    """

    lr: float = option(0.1, above=0)
    momentum: float = option(0.0, at_least=0, below=1)
    epochs: int = option(20, at_least=1)
    penalty: float = option(0.0005, at_least=0)

    def __post_init__(self) -> None:
        check_options(self, "masks")


@dataclass(frozen=True)
class PruningOptions:
    """Which filters go, how many, and what is done after that.

    The rule `auto` takes filters that carry the target class, step by step, until the traces of the
    backdoor are gone or `harm` and `amount` allow no more. Soft masks and tuning follow it alone.
    The others take the filters with the lowest M1 + M2, as in the paper. By every rule, at least
    one filter of each layer stays.

    Harm is counted in nats: the rise of the loss on clean images, and with fewer than 2,500 of
    them also how far predictions move.

    Args:
        rule: `auto`, or the lowest M1 + M2 by `count`, `share` or `threshold`.
        amount: The count, share or threshold; for `auto`, the most to prune as a share of all.
        harm: Most harm to clean images by the rule `auto`, in nats.
        impurity: Share of the defense set that may be poisoned; harm is measured without it.
        soft_mask_steps: Steps that turn down kernels, if traces are left.
        tuning_steps: Steps that tune weights after that. Before them, kernels with low soft masks
            are cut.
        repair: Whether the logits are balanced again after pruning; the target's logit stays.
        reaudit: Whether a pruned network is audited again.
        removes: What pruning sets to zero: the output `map`, or the weights of the `filter` alone,
            to the letter of Sec. 3.2. A bias or normalization layer then leaves a constant map.
    """

    rule: PruningRule = option("auto", choices=get_args(PruningRule))
    amount: float = option(0.05)
    harm: float = option(0.015, above=0)
    impurity: float = option(0.0, at_least=0, below=0.5)
    soft_mask_steps: int = option(30, at_least=0)
    tuning_steps: int = option(120, at_least=0)
    repair: bool = option(True)
    reaudit: bool = option(True)
    removes: Removal = option("map", choices=get_args(Removal))

    def __post_init__(self) -> None:
        check_options(self, "pruning")
        amount = self.amount
        if self.rule == "threshold":
            fits, expected = 1 <= amount <= 3, "from 1 to 3, the range of M1 + M2"
        elif self.rule == "count":
            fits = amount >= 0 and float(amount).is_integer()
            expected = "a whole number of filters, at least 0"
        elif self.rule == "share":
            fits, expected = 0 <= amount < 1, "a share from 0 to below 1"
        else:
            fits, expected = 0 < amount < 1, "a share above 0 and below 1"
        require(fits, self, "amount", f"{expected} (`rule` is {self.rule!r})", "pruning")
        known = self.removes == "map" or self.rule != "auto"
        require(
            known, self, "removes", "'map' with the rule 'auto', which measures maps", "pruning"
        )


@dataclass(frozen=True)
class VerdictOptions:
    """When a network is called backdoored.

    Args:
        rule: Judge by the score of the `signals`, or by the detection `ratio` (Eq. 8).
        threshold: Score from which a network is backdoored; `calibrate` finds one of your own.
        delta: Detection ratio up to which a network is backdoored (Eq. 8).
        saliency: The ratio compares magnitude with what each output `map` does for the loss, layer
            by layer, or with `weight` times gradient over all filters (Eq. 11, to the letter).
        most_classes: Most classes that triggers are searched for, at least 3.
        reference: File that `calibrate` wrote, with whose clean networks the score is compared;
            those that this package was measured on if empty.
        raise_rare_classes: Whether the logits of classes predicted too rarely are raised.
    """

    rule: VerdictRule = option("signals", choices=get_args(VerdictRule))
    threshold: float = option(1.0, above=0)
    delta: float = option(0.2, at_least=0, at_most=1)
    saliency: Saliency = option("map", choices=get_args(Saliency))
    most_classes: int = option(20, at_least=3)
    reference: str = option("")
    raise_rare_classes: bool = option(True)

    def __post_init__(self) -> None:
        check_options(self, "verdict")
