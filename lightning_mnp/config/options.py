"""All options of an audit or a defense, their defaults, and the setting of the paper."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, get_args

from lightning_mnp.config.dotted import dotted
from lightning_mnp.config.groups import (
    FilterOptions,
    MaskOptions,
    PruningOptions,
    SuppressionOptions,
    VerdictOptions,
)
from lightning_mnp.config.ranges import check_options, option
from lightning_mnp.defense_data.augment import Augmentation

__all__ = ["MNPConfig", "grouped_message", "require_config"]

Kind = TypeVar("Kind")

_GROUPS: dict[str, type] = {
    "filters": FilterOptions,
    "suppression": SuppressionOptions,
    "masks": MaskOptions,
    "pruning": PruningOptions,
    "verdict": VerdictOptions,
}
# The groups that have an option of a name.
_GROUPS_OF: dict[str, list[str]] = {}
for _group, _kind in _GROUPS.items():
    for _field in fields(_kind):
        _GROUPS_OF.setdefault(_field.name, []).append(_group)


def _refuse_flat_names(cls: type[Kind]) -> type[Kind]:
    """Let the constructor name the group of an option that is given without one."""
    init = cls.__init__

    @functools.wraps(init)
    def checked(self: Kind, *args: Any, **options: Any) -> None:
        for name in options:
            if name in _GROUPS_OF:
                raise TypeError(_grouped_message(name))
        init(self, *args, **options)

    cls.__init__ = checked  # type: ignore[method-assign, assignment]
    return cls


def grouped_message(name: str) -> str | None:
    """Return where an option is that is given without its group; None if it is no such option.

    Args:
        name: The name without a group.

    Example:
        >>> grouped_message("runs").split(". ")[0]
        'The option `runs` belongs to a group: `suppression.runs`'
    """
    return _grouped_message(name) if name in _GROUPS_OF else None


def _grouped_message(name: str) -> str:
    groups = _GROUPS_OF[name]
    places = " or ".join(f"`{group}.{name}`" for group in groups)
    kind = _GROUPS[groups[0]].__name__
    return (
        f"The option `{name}` belongs to a group: {places}. Write "
        f"MNPConfig({groups[0]}={kind}({name}=...)), or `--mnp.{groups[0]}.{name}` on the command "
        "line."
    )


@_refuse_flat_names
@dataclass(frozen=True)
class MNPConfig:
    """All options of an audit or a defense.

    How the defaults were chosen, with the measurements, is told on the documentation's pages
    "The verdict" and "Pruning".

    Args:
        seed: Seed of all that is drawn; the same seed gives the same outcome.
        batch_size: Most images in a batch; below 128, signals get weaker.
        augment: Shift and mirror clean images: `none`, `crop` (shifts only) or `crop-flip`.
        filters: Which filters take part, and how they are masked.
        suppression: Clean suppression (Eq. 6).
        masks: The dual masks M1 and M2 (Eq. 5 and 7).
        pruning: Which filters go, and how many.
        verdict: When a network is called backdoored.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is given without its group.

    Example:
        >>> config = MNPConfig(seed=1, pruning=PruningOptions(rule="count", amount=30))
        >>> config.pruning.amount
        30
    """

    seed: int = option(0)
    # Batches of two would leave a batch of one of an odd number of images.
    batch_size: int = option(128, at_least=3, why=", so that no batch holds a single image")
    augment: Augmentation = option("crop-flip", choices=get_args(Augmentation))
    filters: FilterOptions = field(default_factory=FilterOptions)
    suppression: SuppressionOptions = field(default_factory=SuppressionOptions)
    masks: MaskOptions = field(default_factory=MaskOptions)
    pruning: PruningOptions = field(default_factory=PruningOptions)
    verdict: VerdictOptions = field(default_factory=VerdictOptions)

    def __post_init__(self) -> None:
        check_options(self)
        for name, kind in _GROUPS.items():
            found = getattr(self, name)
            if not isinstance(found, kind):
                raise TypeError(
                    f"Expected argument `{name}` to be {kind.__name__}, but got {found!r}. Write "
                    f"MNPConfig({name}={kind.__name__}(...))."
                )

    @classmethod
    def paper(
        cls, changes: Mapping[str, Any] | None = None, *, seed: int = 0, **flat: Any
    ) -> MNPConfig:
        """Return the setting of Sec. 5.1: one run of T passes, 0.625% of the filters, delta 0.2.

        The paper prunes 30 filters of its ResNet-18, which has 4,800. That is a share of 0.625%,
        and this share is pruned of any network.

        Three things are not to the letter. Each has an option that is:

        - A mask acts on the output map, behind the normalization layer. ``{"filters.site":
          "filter", "filters.statistics": "running"}`` masks the convolution instead. Normalization
          by the statistics of the batch would undo such a mask.
        - Pruning sets the output map to zero. ``{"pruning.removes": "filter"}`` sets only the
          weights to zero, and a bias or normalization layer then leaves a constant map.
        - Only convolutions have filters. ``{"filters.linear": True}`` adds hidden fully connected
          layers, as convolutions with 1x1 kernels. The last layer never takes part: its units are
          the classes.

        The paper says nothing of normalization statistics. Those of the batch are used, as in the
        default.

        Args:
            changes: Options that differ, by name, as for :meth:`changed`.
            seed: Seed of all that is drawn.
            flat: Nothing; options without their group are refused by name.

        Raises:
            ValueError: If an option is unknown, without its group, or out of range.

        Example:
            >>> MNPConfig.paper(seed=3).suppression.lr
            0.01
        """
        published = {
            "augment": "none",
            "suppression.runs": 1,
            "suppression.more_runs": 0,
            "suppression.lr": 0.01,
            "suppression.momentum": 0.0,
            "suppression.epochs": 20,
            "suppression.parts": 1,
            "suppression.stop_accuracy": None,
            "pruning.rule": "share",
            "pruning.amount": 0.00625,
            "pruning.soft_mask_steps": 0,
            "pruning.tuning_steps": 0,
            "pruning.repair": False,
            "pruning.reaudit": False,
            "verdict.rule": "ratio",
            "verdict.saliency": "weight",
            "verdict.raise_rare_classes": False,
        }
        return cls(seed=seed).changed({**published, **(changes or {}), **flat})

    @classmethod
    def averaged_masks(
        cls, changes: Mapping[str, Any] | None = None, *, seed: int = 0, **flat: Any
    ) -> MNPConfig:
        """Return the setting of the paper, with M1 + M2 averaged over three steadier runs.

        It differs from :meth:`paper` in five things. Suppression has momentum 0.9 and stops when
        the accuracy has fallen to 0.2, so that the backdoor is not unlearned as well. The masks
        have momentum 0.9. Images are shifted and mirrored. M1 + M2 is averaged over three runs,
        because a single run now and then ranks a filter low that clean images need. The detection
        ratio takes the saliency of output maps.

        The verdict is by this ratio, which tells little. Prune with ``when="always"``, or judge by
        ``{"verdict.rule": "signals"}``, which takes longer than the masks.

        Args:
            changes: Options that differ, by name, as for :meth:`changed`.
            seed: Seed of all that is drawn.
            flat: Nothing; options without their group are refused by name.

        Raises:
            ValueError: If an option is unknown, without its group, or out of range.

        Example:
            >>> MNPConfig.averaged_masks({"suppression.runs": 1}).masks.momentum
            0.9
        """
        steadier = {
            "augment": "crop-flip",
            "suppression.runs": 3,
            "suppression.momentum": 0.9,
            "suppression.stop_accuracy": 0.2,
            "masks.momentum": 0.9,
            "verdict.saliency": "map",
        }
        return cls.paper({**steadier, **(changes or {}), **flat}, seed=seed)

    def changed(self, changes: Mapping[str, Any]) -> MNPConfig:
        """Return a copy with some options changed.

        Args:
            changes: New values by name, as on the command line: ``"seed"``,
                ``"suppression.runs"``.

        Raises:
            ValueError: If a name is unknown, or a value is out of range.

        Example:
            >>> MNPConfig().changed({"suppression.runs": 4, "seed": 1}).suppression.runs
            4
        """
        known = list(self._names())
        grouped: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(_unknown_message(name, known))
            group, _, own = name.rpartition(".")
            grouped.setdefault(group, {})[own] = value
        top = grouped.pop("", {})
        groups = {name: replace(getattr(self, name), **own) for name, own in grouped.items()}
        return replace(self, **groups, **top)

    def _names(self) -> Iterator[str]:
        for each in fields(self):
            value = getattr(self, each.name)
            if is_dataclass(value):
                yield from (f"{each.name}.{own.name}" for own in fields(value))
            else:
                yield each.name

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> MNPConfig:
        """Make options of primitives in groups, as :meth:`to_dict` or a YAML file has them.

        Args:
            options: Values by name, groups as mappings; what is missing has its default.

        Raises:
            ValueError: If a name is unknown, or a value is out of range.

        Example:
            >>> MNPConfig.from_dict({"seed": 3, "masks": {"epochs": 5}}).masks.epochs
            5
        """
        return cls().changed(dotted(options))

    def flat(self) -> dict[str, Any]:
        """Return all options as primitives by name, as :meth:`changed` takes them.

        Example:
            >>> MNPConfig().flat()["suppression.runs"]
            2
        """
        return dotted(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return all options as primitives, in groups."""
        options = asdict(self)
        for name in ("include", "exclude"):
            options["filters"][name] = list(options["filters"][name])
        return options


def _unknown_message(name: str, known: list[str]) -> str:
    if name in _GROUPS_OF:
        return _grouped_message(name)
    near = difflib.get_close_matches(name, known, 1)
    meant = f" Did you mean {near[0]!r}?" if near else f" There are {', '.join(known)}."
    return f"Expected the name of an option, but got {name!r}.{meant}"


def require_config(config: MNPConfig | None) -> MNPConfig:
    """Return the options, or the default if there are none.

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
            "Write MNPConfig(seed=4), say, with the options as arguments."
        )
    return config
