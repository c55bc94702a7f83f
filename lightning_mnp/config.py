"""The options of the method, their defaults, and the setting of the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from lightning_mnp.surgery.layers import Site
from lightning_mnp.surgery.masked_network import Statistics

__all__ = [
    "Augmentation",
    "MNPConfig",
    "PruningRule",
    "VerdictRule",
    "require_config",
    "require_option",
]

Augmentation = Literal["none", "crop", "crop-flip"]
PruningRule = Literal["auto", "count", "share", "threshold"]
VerdictRule = Literal["signals", "ratio"]

# Options that are whole numbers, with the least of each.
_WHOLE = {
    "runs": 1,
    "more_runs": 0,
    "most_classes": 3,
    "batch_size": 3,
    "suppression_epochs": 1,
    "suppression_parts": 1,
    "mask_epochs": 1,
    "attenuation_steps": 0,
}
_NUMBERS = (
    *("suppression_lr", "suppression_momentum", "stop_accuracy", "mu"),
    *("mask_lr", "mask_momentum", "penalty"),
    *("amount", "harm", "impurity", "threshold", "delta"),
)


@dataclass(frozen=True)
class MNPConfig:
    """All options of an audit or a defense.

    How the defaults were chosen, with the measurements and where they were not kept apart from the
    networks reported on, is told by the page "What was tried for the default".

    Args:
        seed: Seed of everything that is drawn: batch order, augmentation, parts of the defense
            set, where searches begin. The same seed gives the same outcome.
        runs: Number of suppression runs, whose masks and signals are averaged.
        more_runs: Most further suppression runs, made where the pile-up is between 0.6 and 2 times
            what counts fully and no other signal counts fully; 0 for none.
        most_classes: Most classes for which reach, margin, patch, overlay and warp are tried, at
            least 3; those that predictions pile up on come first, others are drawn.
        batch_size: Most images in a batch, at least 3; batches of a pass are made equally large.
            Below 128, what stands in for a trigger is made on fewer images, and signals get weaker.
        augment: Shifts and mirrors images of the defense set in suppression, masks and
            attenuation, and in the copies by which harm is measured: ``"none"``, ``"crop"`` (shifts
            only) or ``"crop-flip"``.
        site: Where a mask acts: ``"norm"``, behind the normalization layer, or ``"filter"``.
        statistics: ``"batch"`` normalizes by batch statistics in suppression, saliency and masks,
            ``"running"`` by the stored ones, as everything else does.
        include: Name patterns of the convolutions to take.
        exclude: Name patterns of the convolutions to leave out.
        suppression_lr: Learning rate of clean suppression, eta_1 in the paper.
        suppression_momentum: Momentum of clean suppression, from 0 to below 1; above 0 it takes
            memory for one more copy of the weights.
        suppression_epochs: Most passes over the images of a run, T in the paper.
        suppression_parts: Each run of clean suppression sees one of so many parts of the defense
            set, the next run the next; 1 for all of it. What a network falls back to by chance
            differs between parts, what a backdoor makes of it does not.
        stop_accuracy: Clean suppression stops when the accuracy on the defense set falls to
            this share; None for all T passes.
        mu: Weight of the squared norm in clean suppression (Eq. 6); as much as a weight decay
            of 2 mu. Twice its product with `suppression_lr` is below 1.
        mask_lr: Learning rate of both masks, eta_2 in the paper. The rule ``"auto"`` makes no such
            masks and does not use this and the next three.
        mask_momentum: Momentum of both masks, from 0 to below 1.
        mask_epochs: Passes over the defense set for the masks.
        penalty: Weight of the magnitude term of both masks, lambda in Eq. 5 and 7.
        rule: Which filters are pruned: ``"auto"`` takes those that carry the target class, one by
            one, as many as `harm` and `amount` allow; ``"count"``, ``"share"`` and
            ``"threshold"`` take the lowest M1 + M2, as in the paper.
        amount: The count, the share of all filters, or the threshold on M1 + M2; for ``"auto"``
            the most that may be pruned, as a share of all filters, above 0 (of very few filters,
            one may be in any case).
        harm: Most harm to clean images by the rule ``"auto"``, in nats: the rise of their loss,
            with fewer than 2500 images also how far predictions move. A quarter of it where
            the backdoor hardly shows any more; filters that are turned down after pruning may do
            twice as much once more.
        impurity: Share of the defense set that may be poisoned, from 0 to below 0.5. The rule
            ``"auto"`` leaves out as many images, those that suffer most, where it measures harm,
            rounded up in each batch: a few poisoned images would protect the backdoor.
        attenuation_steps: Most steps in which the rule ``"auto"`` turns down filters that are left,
            by factors from 0 to 1, so that the clean loss and what is left of the backdoor get
            least together; 0 leaves them as they are.
        verdict: ``"signals"`` judges by the score of seven signals: pile-up, reach, greatest
            margin, patch, overlay, warp and permutation; ``"ratio"`` by Eq. 8.
        threshold: A network is backdoored where the score is at least this, above 0; see
            `lightning-mnp calibrate` for one of your own.
        delta: Detection threshold of Eq. 8.
        balance: Whether the logit of a class that is predicted far too rarely on clean images is
            raised while the network is audited. Attacks that leave labels alone hide behind that.
        repair: Whether constants are added to the logits after pruning, to balance the classes
            on clean images again; the target's logit stays.
        reaudit: Whether a pruned network is audited again.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> MNPConfig(rule="count", amount=30).amount
        30
    """

    seed: int = 0
    runs: int = 2
    more_runs: int = 6
    most_classes: int = 20
    batch_size: int = 128
    augment: Augmentation = "crop-flip"
    site: Site = "norm"
    statistics: Statistics = "batch"
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    suppression_lr: float = 0.02
    suppression_momentum: float = 0.0
    suppression_epochs: int = 40
    suppression_parts: int = 2
    stop_accuracy: float | None = 0.2
    mu: float = 0.001
    mask_lr: float = 0.1
    mask_momentum: float = 0.0
    mask_epochs: int = 20
    penalty: float = 0.0005
    rule: PruningRule = "auto"
    amount: float = 0.05
    harm: float = 0.015
    impurity: float = 0.0
    attenuation_steps: int = 150
    verdict: VerdictRule = "signals"
    threshold: float = 1.0
    delta: float = 0.2
    balance: bool = True
    repair: bool = True
    reaudit: bool = True

    def __post_init__(self) -> None:
        for name, choices in (
            ("augment", Augmentation),
            ("site", Site),
            ("statistics", Statistics),
            ("rule", PruningRule),
            ("verdict", VerdictRule),
        ):
            require_option(
                getattr(self, name) in get_args(choices), self, name, f"{get_args(choices)}"
            )
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            listed = not isinstance(patterns, str) and all(isinstance(p, str) for p in patterns)
            require_option(listed, self, name, "a list of name patterns")
        self._require_numbers()
        # Batches of two would leave a batch of one of an odd number of images.
        why = {"batch_size": ", so that no batch holds a single image"}
        for name, least in _WHOLE.items():
            value, expected = getattr(self, name), f"a whole number, at least {least}"
            fits = _is_number(value, int) and value >= least
            require_option(fits, self, name, expected + why.get(name, ""))
        for name in ("suppression_lr", "mask_lr"):
            value = getattr(self, name)
            require_option(math.isfinite(value) and value > 0, self, name, "above 0")
        for name in ("mu", "penalty"):
            value = getattr(self, name)
            require_option(math.isfinite(value) and value >= 0, self, name, "at least 0")
        if 2 * self.mu * self.suppression_lr >= 1:
            raise ValueError(
                f"Expected 2 * `mu` * `suppression_lr` to be below 1, or a step of weight decay "
                f"takes all of the weights, but got `mu` = {self.mu!r} and `suppression_lr` = "
                f"{self.suppression_lr!r}. Lower one of them."
            )
        for name in ("suppression_momentum", "mask_momentum"):
            require_option(0 <= getattr(self, name) < 1, self, name, "from 0 to below 1")
        stop = self.stop_accuracy
        require_option(
            stop is None or 0 < stop < 1, self, "stop_accuracy", "between 0 and 1, or None"
        )
        for name in ("balance", "repair", "reaudit"):
            require_option(isinstance(getattr(self, name), bool), self, name, "True or False")
        require_option(0 < self.harm < math.inf, self, "harm", "above 0")
        require_option(0 <= self.impurity < 0.5, self, "impurity", "from 0 to below 0.5")
        require_option(0 < self.threshold < math.inf, self, "threshold", "above 0")
        require_option(0 <= self.delta <= 1, self, "delta", "from 0 to 1")
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
        require_option(fits, self, "amount", f"{expected} (`rule` is {self.rule!r})")

    def _require_numbers(self) -> None:
        """Refuse what is no number, before anything is compared."""
        require_option(_is_number(self.seed, int), self, "seed", "a whole number")
        for name in _NUMBERS:
            value = getattr(self, name)
            none = name == "stop_accuracy" and value is None
            require_option(none or _is_number(value, int, float), self, name, "a number")

    @classmethod
    def paper(cls, **changes: Any) -> MNPConfig:
        """Make the setting of Sec. 5.1: one run of T passes, 30 filters pruned, delta 0.2.

        Where a mask acts and how normalization layers run is not said in the paper; both are as
        in the default.

        Args:
            changes: Options that differ.

        Example:
            >>> MNPConfig.paper(seed=3).suppression_lr
            0.01
        """
        options: dict[str, Any] = {
            "runs": 1,
            "more_runs": 0,
            "augment": "none",
            "suppression_lr": 0.01,
            "suppression_epochs": 20,
            "suppression_parts": 1,
            "stop_accuracy": None,
            "rule": "count",
            "amount": 30,
            "verdict": "ratio",
            "balance": False,
            "attenuation_steps": 0,
            "repair": False,
            "reaudit": False,
        }
        return cls(**{**options, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Give all options as primitives."""
        options = asdict(self)
        options["include"], options["exclude"] = list(self.include), list(self.exclude)
        return options


def require_config(config: MNPConfig | None) -> MNPConfig:
    """Give the options, the default's where there are none.

    Args:
        config: Options, or None.

    Raises:
        TypeError: If it is something else.

    Example:
        >>> require_config(None) == MNPConfig()
        True
    """
    if config is None:
        return MNPConfig()
    if not isinstance(config, MNPConfig):
        raise TypeError(
            f"Expected argument `config` to be an MNPConfig, but got {type(config).__name__}. "
            "Write MNPConfig(runs=4), say, with the options as arguments."
        )
    return config


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def require_option(condition: bool, options: object, name: str, expected: str) -> None:
    """Refuse an option that is out of range.

    Args:
        condition: Whether it is in range.
        options: The object that has it as an attribute.
        name: Its name.
        expected: What it is expected to be.

    Raises:
        ValueError: If the condition does not hold.

    Example:
        >>> require_option(True, MNPConfig(), "runs", "at least 1")
    """
    if not condition:
        raise ValueError(
            f"Expected argument `{name}` to be {expected}, but got {getattr(options, name)!r}."
        )
