"""All that stands in for an unknown trigger: reach, margin, patterns and permutation."""

from __future__ import annotations

from typing import Any, Protocol

from lightning_mnp.config import MNPConfig
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.signals.margin import MarginSearch
from lightning_mnp.signals.overlay import OverlayTrigger
from lightning_mnp.signals.patch import PatchTrigger
from lightning_mnp.signals.pattern import PatternSearch
from lightning_mnp.signals.permutation import PermutationSearch
from lightning_mnp.signals.reach import ReachSearch, image_scale
from lightning_mnp.signals.verdict import Evidence
from lightning_mnp.signals.warp import WarpTrigger
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["Surrogates"]


class _Search(Protocol):
    @property
    def finished(self) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Surrogates:
    """The searches for surrogate triggers, on the same network, images and classes.

    Args:
        masked: The network.
        data: The defense set.
        config: Options.

    Attributes:
        reach: How long a universal perturbation to each class has to be.
        margin: The greatest margin of each class.
        patch: How far a patch drives images to each class.
        overlay: How far an overlay does.
        warp: How far a warp does; None where images are not of shape (N, C, H, W).
        permutation: Whether a patch exchanges classes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> surrogates = Surrogates(masked, data, MNPConfig())
        >>> surrogates.choose_classes([1], 2)
        >>> surrogates.reach.classes, surrogates.evidence.complete
        ([1, 0], False)
    """

    def __init__(self, masked: MaskedNetwork, data: DefenseSet, config: MNPConfig) -> None:
        seed, size = config.seed, config.batch_size
        self.reach = ReachSearch(masked, image_scale(data.images), [], seed)
        self.margin = MarginSearch(masked, data.images, [], seed, size)
        self.patch = PatternSearch(PatchTrigger, masked, data, [], seed, size)
        self.overlay = PatternSearch(OverlayTrigger, masked, data, [], seed, size)
        self.warp: PatternSearch[WarpTrigger] | None = None
        if data.images.ndim == 4:
            self.warp = PatternSearch(WarpTrigger, masked, data, [], seed, size)
        self.permutation = PermutationSearch(masked, data, seed, size)
        self._seed = seed
        self._most = config.most_classes

    def choose_classes(self, first: list[int], total: int) -> None:
        """Choose the classes to look at, see :meth:`ReachSearch.choose_classes`.

        Args:
            first: Suspected classes, most suspected first.
            total: Number of all classes.
        """
        classes = ReachSearch.choose_classes(first, total, self._most, self._seed)
        self.reach.classes, self.margin.classes = list(classes), list(classes)
        for search in self._patterns().values():
            search.classes = list(classes)

    def all_steps(self, total: int) -> dict[str, int]:
        """Give an upper bound on the steps of each search as a whole, by its name.

        Args:
            total: Number of all classes of the network.
        """
        tried = min(total, self._most)
        patterns = {
            name: PatternSearch.most_steps_of(search.kind, tried)
            for name, search in self._patterns().items()
        }
        return {
            "reach": ReachSearch.most_steps_of(tried),
            "margin": MarginSearch.most_steps(),
            **patterns,
            "permutation": PermutationSearch.most_steps_of(),
        }

    def most_steps(self, total: int) -> dict[str, int]:
        """Give an upper bound on the steps left in each search, by its name.

        Args:
            total: Number of all classes of the network.
        """
        left = self.all_steps(total)
        if self.reach.classes:
            left["reach"] = self.reach.most_steps()
            left |= {name: search.most_steps() for name, search in self._patterns().items()}
        left["margin"] -= self.margin.steps
        left["permutation"] = self.permutation.most_steps()
        return left

    @property
    def evidence(self) -> Evidence:
        """What the searches have found so far."""
        return Evidence(
            self.reach.reaches,
            self.margin.margins,
            self.patch.margins,
            self.overlay.rises,
            {} if self.warp is None else self.warp.rises,
            self.permutation.permutation,
            self.permutation.moved,
            complete=all(search.finished for search in self._all().values()),
        )

    @property
    def names(self) -> list[str]:
        """The searches that there are, in their order."""
        return list(self._all())

    def _patterns(self) -> dict[str, PatternSearch[Any]]:
        searches = (self.patch, self.overlay, self.warp)
        return {search.kind.name: search for search in searches if search is not None}

    def _all(self) -> dict[str, _Search]:
        searches: dict[str, _Search] = {"reach": self.reach, "margin": self.margin}
        return {**searches, **self._patterns(), "permutation": self.permutation}

    def state_dict(self) -> dict[str, Any]:
        """Give the state as tensors and primitives."""
        return {name: search.state_dict() for name, search in self._all().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        for name, search in self._all().items():
            search.load_state_dict(state[name])
