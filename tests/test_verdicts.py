"""Whole audits of clean networks and odd inputs, on which verdicts were wrong once."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import finish, new_scene
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp import DefenseSet, MNPConfig, audit
from lightning_mnp.signals.patch import PatchSearch

NOISE = 0.45
QUICK = MNPConfig().changed({"suppression.runs": 1, "suppression.more_runs": 0})


@functools.cache
def noisy_digits() -> tuple[Tensor, Tensor]:
    """Digits that a small network cannot always tell apart; mean 0 and standard deviation 1."""
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    images = images + NOISE * noise
    return (images - images.mean()) / images.std(), torch.from_numpy(classes)


class SmallCNN(nn.Module):
    """Three convolutions with random filters, and a linear layer fitted by least squares.

    Nothing is trained, so the network is the same on every processor.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.features = nn.Sequential(
                *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
            )
            self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits

    @torch.no_grad()
    def fit(self, images: Tensor, labels: Tensor) -> SmallCNN:
        for module in self.features:
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics are those of the images
        self.train()(images)
        self.eval()
        features = self.features(images).double()
        features = torch.cat([features, torch.ones(len(features), 1)], 1)
        wanted = 10 * F.one_hot(labels, 10).double()
        solution = torch.linalg.lstsq(features, wanted).solution
        self.head.weight.copy_(solution[:-1].T)
        self.head.bias.copy_(solution[-1])
        return self


@functools.cache
def clean_network(seed: int = 0) -> SmallCNN:
    images, labels = noisy_digits()
    return SmallCNN(seed).fit(images[:1200], labels[:1200])


def defense_images(count: int) -> tuple[Tensor, Tensor]:
    """Images that the network was not fitted to."""
    images, labels = noisy_digits()
    return images[1200 : 1200 + count], labels[1200 : 1200 + count]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_an_ordinary_clean_network_is_not_flagged(seed: int) -> None:
    report = audit(clean_network(seed), [defense_images(200)], seed=0)
    assert 0.3 < report.accuracy_before < 0.9
    assert report.verdict in ("clean", "undecided")


def test_no_patch_stands_out_in_an_ordinary_clean_network() -> None:
    """By the patch, such networks were once called backdoored."""
    scene = new_scene(clean_network(), DefenseSet(*defense_images(200)), range(10))
    signal = finish(PatchSearch(scene)).signal()
    assert len(signal.classes) == 10
    assert signal.strength < 0.9


def test_images_that_are_not_prepared_as_in_training() -> None:
    images, labels = defense_images(60)
    report = audit(clean_network(), [(40 * images + 100, labels)], config=QUICK)
    assert (report.verdict, report.judged) == ("undecided", False)
    assert "seems to be trained on images normalized" in report.reasons[-1]


def test_a_transformer_of_which_only_the_patches_are_convolved() -> None:
    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, 8, 4, 4)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(8, 10)

        def forward(self, images: Tensor) -> Tensor:
            words = self.patches(images).flatten(2).transpose(1, 2)
            logits: Tensor = self.head(self.blocks(words).mean(1))
            return logits

    network = Transformer().eval()
    images, _ = defense_images(60)
    with torch.no_grad():
        labels = network(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % 10  # so that the loss has a slope
    report = audit(network, [(images, labels)], config=QUICK)
    assert (report.verdict, report.judged) == ("undecided", False)
    [reason] = [text for text in report.reasons if text.startswith("only 1 of the network's")]
    assert "% of the weights) are convolutions that take part" in reason
