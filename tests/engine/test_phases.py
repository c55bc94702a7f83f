"""What the phases of an audit hand on: doubts, from the reference to the report."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from distributed_script import small_network
from helpers import Shortcut, images_and_labels, quick_config
from torch import Tensor, nn

from lightning_mnp import DefenseSet, MNPDefense, audit
from lightning_mnp.engine.case import When

short = pytest.mark.usefixtures("short_searches")


@short
@pytest.mark.parametrize("verdict", ["signals", "ratio"])
def test_few_images_are_audited_and_not_judged(verdict: str) -> None:
    config = quick_config(runs=1, verdict=verdict)
    report = audit(small_network(), [images_and_labels(20)], config=config)
    assert (report.verdict, report.judged, report.exit_code) == ("undecided", False, 4)
    assert report.reasons[-1].startswith("the defense set has 20 images, which are too few")


@short
@pytest.mark.parametrize(("when", "searched"), [("never", 0), ("flagged", 0), ("always", 1)])
def test_nothing_is_searched_for_in_a_network_that_will_not_be_judged(
    when: When, searched: int
) -> None:
    data = DefenseSet(*images_and_labels(20))
    defense = MNPDefense(small_network(), data, quick_config(runs=1), when=when)
    expected = defense.most_steps()
    while not defense.finished:
        assert defense.most_steps() <= expected
        defense.step()
    report = defense.report()
    assert (report.verdict, report.target_class, report.all_to_all) == ("undecided", None, False)
    assert math.isnan(report.score) == (not searched)
    assert bool(report.signals) == bool(searched)
    assert (report.passes["patch"] > 0) == bool(searched)


@short
def test_doubts_are_part_of_the_state() -> None:
    def new_defense() -> MNPDefense:
        data = DefenseSet(*images_and_labels(20))
        return MNPDefense(small_network(), data, quick_config(runs=1), when="never")

    defense, again = new_defense(), new_defense()
    while defense.phase == "reference":
        defense.step()
    [doubt] = defense.case.doubts
    assert "at least 50 are needed" in doubt
    again.load_state_dict(copy.deepcopy(defense.state_dict()))
    assert again.case.doubts == (doubt,)


class Templates(nn.Module):
    """Knows ten images by heart, where they are; shifted or mirrored, they are strange to it."""

    def __init__(self, templates: Tensor) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 16, bias=False)
        self.head = nn.Linear(10, 10, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(templates / 16)
            self.head.weight.copy_(torch.eye(10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(images).flatten(1))
        return logits


@short
def test_a_network_that_knows_all_is_not_said_to_know_too_little() -> None:
    templates = torch.randn(10, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(100) % 10
    noise = torch.randn(100, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = templates[labels] + 0.1 * noise, labels
    options = {"runs": 1, "stop_accuracy": 0.7, "batch_size": 128}
    report = audit(Templates(templates), [batch], config=quick_config(**options))
    assert report.accuracy_before == 1.0
    assert not report.judged
    [run] = report.runs
    assert report.reasons[-1] == (
        "clean suppression took no step (the accuracy fell to `stop_accuracy`): the network "
        f"recognizes {run.accuracy:.0%} of the images as that stage runs it (`augment` is "
        "'crop-flip', `filters.statistics` is 'batch'), but 100% of them as they are; if it was "
        "not trained on shifted or mirrored images, set `augment` to 'crop' or 'none'"
    )
    plain = audit(Templates(templates), [batch], config=quick_config(augment="none", **options))
    assert plain.judged


def test_a_network_with_a_short_way_to_a_class_is_flagged() -> None:
    """A bright pixel is enough for class 1, whatever else there is."""

    def way(images: Tensor) -> Tensor:
        return 20 * nn.functional.softplus(4 * (images[:, 0, 7, 7] - 2.0))

    network = Shortcut(1, way, small_network()).eval()
    config, images = quick_config(runs=1), [images_and_labels(60)]
    report = audit(network, images, config=config)
    assert (report.verdict, report.judged, report.target_class) == ("backdoored", True, 1)
    assert report.reasons[0].startswith("a patch on few pixels drives images to class 1 further")
    patch = report.signals[0]
    assert (patch.name, patch.counts, report.score) == ("patch", True, patch.strength)
    assert report.signals[-1].name == "pile-up"
    assert not report.signals[-1].decides
    shown = report.triggers[0]
    assert (shown.signal, shown.target_class, len(shown.examples)) == ("patch", 1, 3)
    assert shown.success == 1.0
    assert all(trigger.target_class == 1 for trigger in report.triggers)
    assert all(example.after == 1 for example in shown.examples)
    by_class = report.class_accuracy_before
    counts = dict.fromkeys(range(4), 15)
    assert sum(by_class[k] * counts[k] for k in counts) / 60 == pytest.approx(
        report.accuracy_before
    )
    assert report.class_accuracy_after == {}
    [run] = report.runs
    assert run.curve
    assert all(0 <= accuracy <= 1 for accuracy in run.curve)


@short
def test_an_interrupt_while_a_trigger_is_drawn_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def new_defense() -> MNPDefense:
        data = DefenseSet(*images_and_labels(60))
        return MNPDefense(small_network(), data, quick_config(runs=1), when="never")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    def finish(defense: MNPDefense) -> None:
        while not defense.finished:
            defense.step()

    plain, defense = new_defense(), new_defense()
    finish(plain)
    with monkeypatch.context() as patched:
        patched.setattr("lightning_mnp.signals.pattern.portray", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(defense)
    assert defense.phase == "patch"
    finish(defense)
    assert defense.report().triggers == plain.report().triggers
    again = new_defense()
    again.load_state_dict(plain.state_dict())
    assert again.report().triggers == plain.report().triggers


@short
def test_a_step_that_is_taken_again_counts_no_image_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def new_defense() -> MNPDefense:
        data = DefenseSet(*images_and_labels(40))  # batches of 14, 13 and 13 images
        return MNPDefense(small_network(), data, quick_config(runs=1), when="never")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    plain, defense = new_defense(), new_defense()
    with monkeypatch.context() as patched:
        patched.setattr("lightning_mnp.engine.phases.find_doubts", interrupted)
        defense.step()
        defense.step()
        with pytest.raises(KeyboardInterrupt):
            defense.step()
    defense.step()
    for _ in range(3):
        plain.step()
    assert defense.phase == plain.phase == "suppression"
    for name in ("accuracy", "correlation", "doubts"):
        assert getattr(defense.case, name) == getattr(plain.case, name)
