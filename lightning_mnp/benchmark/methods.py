"""The defenses and detectors of a benchmark: found by name, with options, all called alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import nn

from lightning_mnp import baselines
from lightning_mnp.api import audit, defend
from lightning_mnp.baselines import BaselineResult, DetectionResult, Suspects
from lightning_mnp.benchmark.names import file_digests, nearest
from lightning_mnp.config import MNPConfig
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.report import DefenseReport
from lightning_mnp.signals.population import read_population

__all__ = ["Method", "Outcome", "Task", "method_names"]

Task = Literal["defense", "detector"]

# This package's own settings: the default, the paper's, and the paper's made steadier.
_OURS: dict[str, Callable[..., MNPConfig]] = {
    "default": MNPConfig,
    "mnp": MNPConfig.paper,
    "mnp-averaged": MNPConfig.averaged_masks,
}
_WHENS = ("always", "flagged")
_DEFENSES: dict[str, tuple[Callable[..., BaselineResult], type[Any]]] = {
    "ft": (baselines.ft, baselines.FTConfig),
    "fp": (baselines.fp, baselines.FPConfig),
    "clp": (baselines.clp, baselines.CLPConfig),
    "nft": (baselines.nft, baselines.NFTConfig),
    "rnp": (baselines.rnp, baselines.RNPConfig),
    "anp": (baselines.anp, baselines.ANPConfig),
    "i-bau": (baselines.ibau, baselines.IBAUConfig),
    "ft-sam": (baselines.ft_sam, baselines.FTSAMConfig),
    "nad": (baselines.nad, baselines.NADConfig),
    "nc": (baselines.nc, baselines.NCUnlearningConfig),
}
# Each with what it looks at: clean images, images that may be poisoned, or both.
_DETECTORS: dict[str, tuple[Callable[..., DetectionResult], type[Any], str]] = {
    "nc": (baselines.detect_nc, baselines.NCConfig, "images"),
    "mm-bd": (baselines.detect_mm_bd, baselines.MMBDConfig, "images"),
    "ac": (baselines.detect_ac, baselines.ACConfig, "suspects"),
    "sc": (baselines.detect_sc, baselines.SCConfig, "suspects"),
    "strip": (baselines.detect_strip, baselines.STRIPConfig, "both"),
}


@dataclass
class Outcome:
    """The result of a method on one network.

    Attributes:
        model: The defended copy; None after a detector.
        verdict: ``"clean"``, ``"backdoored"`` or ``"undecided"``; None after a defense that comes
            to no verdict.
        target_class: The suspected class; None if there is none.
        score: How suspicious the network is, in the method's own unit; None without a verdict.
        pruned: Pairs (layer name, filter index) of the removed filters.
        passes: Images that went through the network, as the method counts them itself; None if it
            does not. Forward and backward of one image counts 1, forward alone a third.
        details: Further numbers about the run, by name.
        report: What this package's own settings report; None after a baseline.
    """

    model: nn.Module | None = None
    verdict: str | None = None
    target_class: int | None = None
    score: float | None = None
    pruned: list[tuple[str, int]] = field(default_factory=list)
    passes: float | None = None
    details: dict[str, float] = field(default_factory=dict)
    report: DefenseReport | None = None

    @classmethod
    def of_report(cls, report: DefenseReport) -> Outcome:
        """Return the outcome of this package's own method.

        Args:
            report: What it reports; its ``model`` is the defended copy, or None after an audit.
        """
        return cls(
            report.model,
            report.verdict,
            report.target_class,
            report.score,
            report.pruned,
            sum(report.passes.values()),
            {"detection_ratio": report.detection_ratio, "turned_down": report.turned_down},
            report,
        )


@dataclass(frozen=True)
class Method:
    """A defense or a detector, with options that differ from its defaults.

    Args:
        name: `default` is this package's setting, `mnp` the paper's and `mnp-averaged` the same
            with masks averaged over three runs; all others are baselines.
        options: Options by name. Those of the first three are named as in MNPConfig, such as
            `pruning.amount`. In addition they take `when`, which is `always` for pruning whatever
            the verdict (the default here, since baselines come to no verdict) or `flagged`.

    Example:
        >>> Method("anp", {"rule": "number", "amount": 30}).label
        'anp (amount=30, rule=number)'
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name, with the options in brackets."""
        inside = ", ".join(f"{name}={value}" for name, value in sorted(self.options.items()))
        return f"{self.name} ({inside})" if inside else self.name

    @property
    def suspects(self) -> Literal["training", "inputs"] | None:
        """Which images the detector of this name looks at that may be poisoned.

        ``"training"`` are images that the network was trained on, ``"inputs"`` are images that it
        gets in use. Detectors that are registered from elsewhere get the former. None for those
        that need none.
        """
        if self.name in _OURS:
            return None
        wants = _DETECTORS[self.name][2] if self.name in _DETECTORS else "suspects"
        if wants == "images":
            return None
        return "inputs" if wants == "both" else "training"

    def files(self) -> dict[str, str]:
        """Return the SHA-256 of each file that an option names, by the name of the option.

        Example:
            >>> Method("default", {"pruning.amount": 0.05}).files()
            {}
        """
        path = self._own_config(0)[0].verdict.reference if self.name in _OURS else ""
        return file_digests({"verdict.reference": path})

    def modules(self, task: Task) -> list[str]:
        """Return the names of the modules that carry out the method.

        Args:
            task: What it is used as.
        """
        if self.name in _OURS:
            return ["lightning_mnp.api"]
        find = baselines.find if task == "defense" else baselines.find_detector
        function: Any = find(self.name)
        while isinstance(function, partial):  # whose own module is functools
            function = function.func
        return [str(getattr(function, "__module__", ""))]

    def check(self, task: Task) -> None:
        """Check name and options.

        Args:
            task: What the method is used as.

        Raises:
            ValueError: If the name or an option is unknown, a value is out of range, or a file that
                an option names cannot serve.

        Example:
            >>> Method("anp", {"amounts": 3}).check("defense")
            Traceback (most recent call last):
            ...
            ValueError: Expected an option of 'anp', ..., but got 'amounts'. Did you mean 'amount'?
        """
        known = method_names(task)
        if self.name not in known:
            raise ValueError(
                f"Expected a {task} out of {', '.join(known)}, but got {self.name!r}."
                f"{nearest(self.name, known)}"
            )
        if self.name in _OURS:
            config, _ = self._own_config(0)
            if config.verdict.reference:
                read_population(config.verdict.reference)
            return
        known_options = _DEFENSES if task == "defense" else _DETECTORS
        if self.name in known_options:
            _configured(self, known_options[self.name][1], 0)
        elif self.options:
            raise ValueError(
                f"Expected no options for {self.name!r}, which was registered from elsewhere, but "
                f"got {', '.join(self.options)}. Register it with these options set."
            )

    def defend(self, network: nn.Module, images: DefenseSet, seed: int) -> Outcome:
        """Remove a backdoor from a copy of a network.

        Args:
            network: The network; it stays as it is.
            images: Clean images.
            seed: Seed of all that is drawn.
        """
        if self.name in _OURS:
            config, when = self._own_config(seed)
            report = defend(network, images, when=when, config=config)
            return Outcome.of_report(report)
        if self.options:
            function, kind = _DEFENSES[self.name]
            result = function(network, images, config=_configured(self, kind, seed))
        else:
            result = baselines.find(self.name)(network, images, seed)
        return Outcome(result.model, pruned=result.pruned, details=dict(result.details))

    def detect(
        self, network: nn.Module, images: DefenseSet, seed: int, suspects: Suspects | None
    ) -> Outcome:
        """Judge a network.

        Args:
            network: The network; it stays as it is.
            images: Clean images.
            seed: Seed of all that is drawn.
            suspects: Images that may be poisoned, for detectors that need them.
        """
        if self.name in _OURS:
            return Outcome.of_report(audit(network, images, config=self._own_config(seed)[0]))
        if self.options:
            function, kind, wants = _DETECTORS[self.name]
            given = {"images": (images,), "suspects": (suspects,), "both": (images, suspects)}
            config = _configured(self, kind, seed)
            result = function(network, *given[wants], config=config)
        else:
            result = baselines.find_detector(self.name)(network, images, seed, suspects)
        details = dict(result.details)
        return Outcome(None, result.verdict, result.target_class, result.score, details=details)

    def _own_config(self, seed: int) -> tuple[MNPConfig, Literal["always", "flagged"]]:
        options = dict(self.options)
        when = options.pop("when", "always")
        if when not in _WHENS:
            raise ValueError(
                f"Expected option `when` of {self.name!r} to be one of {_WHENS}, but got {when!r}."
            )
        _refuse_seed(self)
        return _OURS[self.name](seed=seed).changed(options), when


def method_names(task: Task) -> list[str]:
    """Return the names of all defenses or all detectors.

    Args:
        task: Which of the two.

    Example:
        >>> method_names("detector")[:4]
        ['default', 'mnp', 'mnp-averaged', 'nc']
    """
    others = baselines.names() if task == "defense" else baselines.detector_names()
    return [*_OURS, *others]


def _refuse_seed(method: Method) -> None:
    if "seed" in method.options:
        raise ValueError(
            f"Expected no option `seed` of {method.name!r}: the seeds of the grid are its seeds."
        )


def _configured(method: Method, kind: type[Any], seed: int) -> Any:
    """Return the options of a baseline, with the seed."""
    _refuse_seed(method)
    return _changed(method, _seeded(kind(), seed), method.options)


def _seeded(config: Any, seed: int) -> Any:
    """Set every field `seed`, in groups as well."""
    changes: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name == "seed":
            changes["seed"] = seed
        elif is_dataclass(value):
            changes[each.name] = _seeded(value, seed)
    return replace(config, **changes)


def _changed(method: Method, config: Any, options: Mapping[str, Any]) -> Any:
    known = [each.name for each in fields(config) if each.name != "seed"]
    changes: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        first, _, rest = name.partition(".")
        if first not in known or bool(rest) != is_dataclass(getattr(config, first)):
            raise ValueError(
                f"Expected an option of {method.name!r}, which are {', '.join(known)}, but got "
                f"{name!r}.{nearest(name, known)}"
            )
        if rest:
            groups.setdefault(first, {})[rest] = value
        else:
            changes[first] = tuple(value) if isinstance(value, list) else value
    for group, own in groups.items():
        changes[group] = _changed(method, getattr(config, group), own)
    return replace(config, **changes)
