from __future__ import annotations

import copy
import functools
import math
import re
from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, loader, quick_config, trained_network
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp import DefenseReport, DefenseSet, MNPDefense
from lightning_mnp.config import Constants
from lightning_mnp.mnp.detection_ratio import LITERAL_WARNING, saliency_correlation
from lightning_mnp.mnp.saliency import approximate_clc, filter_magnitudes
from lightning_mnp.mnp.suppression import CleanSuppression, suppression_parts
from lightning_mnp.purify.greedy import GreedyConstants
from lightning_mnp.signals.abstention import AbstentionConstants
from lightning_mnp.signals.overlay import OverlaySearch
from lightning_mnp.signals.verdict import Judgement, signals_to_repeat

short = pytest.mark.usefixtures("short_searches")

JUDGED = Constants(AbstentionConstants(abstain=False))  # so that 40 images are enough
# No trace is ever gone, so that soft masks take steps.
TURNING = Constants(GreedyConstants(gone_at=0.0), AbstentionConstants(abstain=False))


def new_defense(
    network: nn.Module | None = None,
    when: Any = "always",
    constants: Constants | None = JUDGED,
    signals: frozenset[str] | None = None,
    **changes: Any,
) -> MNPDefense:
    data, config = DefenseSet.from_loader(loader()), quick_config(**changes)
    model = network or small_network()
    return MNPDefense(model, data, config, when=when, constants=constants, signals=signals)


@pytest.mark.parametrize(("signals", "told"), [({"stripe", "warp"}, "'stripe'"), (set(), "none")])
def test_signals_that_there_are_not_are_refused(signals: Any, told: str) -> None:
    words = (
        f"Expected argument `signals` to name signals, but got {told}. Choose some of 'pile-up', "
        "'margin', 'patch', 'warp', 'permutation', 'reach', or None for all."
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        new_defense(signals=frozenset(signals))


@short
@pytest.mark.parametrize("name", ["margin", "reach"])
def test_what_the_pile_up_confirms_comes_with_it(name: str) -> None:
    defense = finished(new_defense(when="never", signals=frozenset({name}), runs=1))
    assert {signal.name for signal in defense.report().signals} == {name, "pile-up"}
    assert len(defense.report().runs) == 1


@short
def test_a_state_of_other_signals_is_refused() -> None:
    state = new_defense(when="never", signals=frozenset({"patch"})).state_dict()
    words = "the same signals, but it is None now, and ['patch'] in the state. Remove the file"
    with pytest.raises(ValueError, match=re.escape(words)):
        new_defense(when="never").load_state_dict(state)


@short
def test_a_state_of_other_options_names_those_that_differ() -> None:
    state = new_defense(runs=1, seed=1).state_dict()
    words = (
        "Expected the state to belong to the same options, but `seed` is 0 now, and 1 in the "
        "state; `suppression.runs` is 2 now, and 1 in the state. Remove the file to start anew."
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        new_defense(runs=2).load_state_dict(state)


@short
@pytest.mark.parametrize(
    "name", ["defense set", "constants", "occasion", "layers", "weights", "version"]
)
def test_a_state_of_another_case_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def case(network: nn.Module, data: DefenseSet, when: Any, constants: Constants) -> MNPDefense:
        return MNPDefense(network, data, quick_config(), when=when, constants=constants)

    images, labels = images_and_labels()
    moved = trained_network()
    next(moved.parameters()).data.add_(0.01)
    wider = nn.Sequential(nn.Conv2d(1, 9, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    wider(images[:2])
    usual = trained_network(), DefenseSet(images, labels), "always", JUDGED
    others: dict[str, tuple[Any, ...]] = {
        "defense set": (usual[0], DefenseSet(*images_and_labels(seed=1)), *usual[2:]),
        "constants": (*usual[:3], TURNING),
        "occasion": (*usual[:2], "flagged", JUDGED),
        "layers": (wider, *usual[1:]),
        "weights": (moved, *usual[1:]),
        "version": usual,
    }
    state = case(*usual).state_dict()
    case(*usual).load_state_dict(state)  # its own is taken
    if name == "version":
        monkeypatch.setattr("lightning_mnp.engine.state.version", lambda package: "0.0.9")
    with pytest.raises(ValueError, match=f"the state to belong to the same {name}, but "):
        case(*others[name]).load_state_dict(state)


@short
def test_a_first_step_that_is_taken_again_keeps_the_weights_of_the_run_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_mnp.signals.verdict.hangs_on_pile_up", lambda *found: True)

    def at_second_run() -> MNPDefense:
        defense = new_defense(runs=3, rule="auto", amount=0.05)
        while (defense.phase, defense.run) != ("suppression", 1):
            defense.step()
        return defense

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    plain, defense = at_second_run(), at_second_run()
    with monkeypatch.context() as patched:
        patched.setattr(CleanSuppression, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            defense.step()
    kept = []
    for each in (plain, defense):
        while (each.phase, each.run) != ("suppression", 2):
            each.step()
        each.step()
        kept.append(each.case.suppressed)
    assert [len(runs) for runs in kept] == [2, 2]
    for run, again in zip(*kept, strict=True):
        assert all(weight.equal(again[name]) for name, weight in run.items())


def lasting(report: DefenseReport) -> dict[str, Any]:
    """All of a report that does not depend on the clock, or on what a resumed run does again."""
    content = report.to_dict()
    del content["seconds"], content["passes"], content["date"]
    return content


def finished(defense: MNPDefense) -> MNPDefense:
    while not defense.finished:
        defense.step()
    return defense


def phases(defense: MNPDefense) -> list[str]:
    seen: list[str] = []
    while not defense.finished:
        if not seen or seen[-1] != defense.phase:
            seen.append(defense.phase)
        defense.step()
    return seen


@short
def test_phases_of_the_published_procedure() -> None:
    assert phases(new_defense(verdict="ratio", runs=1)) == [
        "reference", "suppression", "saliency", "masks", "verdict", "pruning", "check",
    ]  # fmt: skip


@short
def test_phases_of_an_audit() -> None:
    assert phases(new_defense(when="never", runs=2)) == [
        "reference", "suppression", "saliency", "margin", "patch", "warp", "permutation",
        "reach", "verdict",
    ]  # fmt: skip
    by_ratio = new_defense(when="never", runs=2, verdict="ratio")
    assert phases(by_ratio) == [
        "reference", *("suppression", "saliency") * 2, "verdict",
    ]  # fmt: skip


@short
@pytest.mark.parametrize("settled", [False, True])
def test_the_usual_runs_are_made_if_the_verdict_hangs_on_the_pile_up(
    monkeypatch: pytest.MonkeyPatch, settled: bool
) -> None:
    monkeypatch.setattr(
        "lightning_mnp.signals.verdict.hangs_on_pile_up", lambda *found: not settled
    )
    defense = new_defense(when="never", runs=3)
    again = ["suppression", "saliency"] * 2 + ["verdict"]
    assert phases(defense)[8:] == ["verdict", *([] if settled else again)]
    at_once = finished(new_defense(runs=3, rule="auto", amount=0.02, soft_mask_steps=0))
    assert defense.case.runs == at_once.case.runs[: 1 if settled else 3]


@short
def test_a_flagged_network_is_pruned_with_the_runs_of_its_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judgement = Judgement("backdoored", 0.5, 0.7, 0, ("a test says so",))
    monkeypatch.setattr("lightning_mnp.engine.case.judge", lambda *args, **options: judgement)
    changes = {"rule": "auto", "amount": 0.05, "runs": 2}
    defense = new_defense(when="flagged", **changes)
    assert phases(defense)[8:] == [
        "verdict", "overlay", "pruning", "soft_masks", "tuning", "check",
    ]  # fmt: skip
    always = finished(new_defense(**changes))
    assert len(defense.case.runs) == 1
    assert defense.case.suppressed == []  # nothing is kept for a run that does not follow
    assert defense.case.runs == always.case.runs
    assert defense.report().pruned == always.report().pruned


@short
def test_automatic_rule_needs_no_masks() -> None:
    changes = {"rule": "auto", "amount": 0.05}
    assert phases(new_defense(runs=1, **changes)) == [
        "reference", "suppression", "saliency", "margin", "patch", "warp", "permutation",
        "reach", "verdict", "overlay", "pruning", "soft_masks", "tuning", "check",
    ]  # fmt: skip
    assert "soft_masks" not in phases(new_defense(runs=1, soft_mask_steps=0, **changes))
    assert "tuning" not in phases(new_defense(runs=1, tuning_steps=0, **changes))


@short
@pytest.mark.parametrize("verdict", ["backdoored", "undecided", "clean"])
@pytest.mark.parametrize("changes", [{"rule": "auto", "amount": 0.05}, {}])
def test_what_is_made_for_pruning_only_is_made_of_a_flagged_network(
    monkeypatch: pytest.MonkeyPatch, verdict: Any, changes: dict[str, Any]
) -> None:
    judgement = Judgement(verdict, 0.5, 0.7, 0, ("a test says so",))
    monkeypatch.setattr("lightning_mnp.engine.case.judge", lambda *args, **options: judgement)
    expected: list[str] = []
    if verdict == "backdoored" and changes:
        expected = ["overlay", "pruning", "soft_masks", "tuning", "check"]
    elif verdict == "backdoored":
        expected = ["suppression", "saliency", "masks", "pruning", "check"]
    made = phases(new_defense(when="flagged", runs=1, **changes))
    assert made[:8] == [
        "reference", "suppression", "saliency", "margin", "patch", "warp", "permutation", "reach",
    ]  # fmt: skip
    assert made[8:] == ["verdict", *expected]


@short
def test_what_a_trace_has_found_is_of_no_account_for_the_verdict() -> None:
    defense = new_defense(runs=1, rule="auto", amount=0.02)
    while defense.phase != "pruning":
        defense.step()
    judgement, search = defense.judgement, defense.case.search("overlay")
    assert judgement.judged
    assert isinstance(search, OverlaySearch)
    search.rises = dict.fromkeys(range(4), float("nan"))
    assert search.failed
    assert defense.case.judge() == judgement
    assert sorted(signal.name for signal in defense.case.signals()) == [
        "margin", "patch", "permutation", "pile-up", "reach", "warp",
    ]  # fmt: skip


@short
def test_unclear_pile_ups_get_further_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[list[int]] = []

    def unclear(found: Any, constants: Any) -> bool:
        judged.append([run.steps for run in defense.case.runs])
        return True

    monkeypatch.setattr("lightning_mnp.signals.verdict.hangs_on_pile_up", lambda *found: True)
    monkeypatch.setattr("lightning_mnp.signals.verdict.in_doubt", unclear)
    defense = new_defense(when="never", more_runs=3)
    assert phases(defense)[6:] == [
        "permutation", "reach", "verdict", "suppression", "saliency", "verdict",
        *("suppression", "saliency") * 2, "verdict", "suppression", "saliency", "verdict",
    ]  # fmt: skip
    assert [len(runs) for runs in judged] == [2, 4, 5]
    at_once = finished(new_defense(runs=5))
    assert defense.case.runs == at_once.case.runs
    assert defense.judgement == at_once.judgement


@short
def test_further_runs_are_resumed_and_leave_the_masks_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_mnp.signals.verdict.in_doubt", lambda *found: True)
    defense = new_defense(more_runs=2)
    while len(defense.case.runs) < 3:
        defense.step()
    again = new_defense(more_runs=2)
    again.load_state_dict(copy.deepcopy(defense.state_dict()))
    assert finished(again).case.runs == finished(defense).case.runs
    assert len(again.case.runs) == 4
    plain = finished(new_defense(constants=JUDGED))
    torch.testing.assert_close(again.case.scores, plain.case.scores)
    assert again.report().pruned == plain.report().pruned


@short
@pytest.mark.parametrize("changes", [{"verdict": "ratio", "rule": "auto", "amount": 0.05}, {}])
def test_there_are_no_further_runs(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(
        "lightning_mnp.signals.verdict.in_doubt", lambda *found: "verdict" in changes
    )
    assert len(finished(new_defense(more_runs=2, **changes)).case.runs) == 2


@short
def test_a_network_that_is_not_judged_gets_no_further_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_mnp.signals.verdict.in_doubt", lambda *found: True)
    defense = finished(new_defense(when="never", constants=None, more_runs=2))
    assert defense.case.doubts
    assert len(defense.case.runs) == 1


@short
@pytest.mark.parametrize("changes", [{}, {"rule": "auto", "amount": 0.05}, {"verdict": "ratio"}])
@pytest.mark.parametrize("when", ["never", "flagged", "always"])
def test_most_steps_is_an_upper_bound(changes: dict[str, Any], when: Any) -> None:
    defense = new_defense(when=when, **changes)
    bounds, plans = [defense.most_steps()], [len(defense.plan.entries)]
    while not defense.finished:
        defense.step()
        bounds.append(defense.most_steps())
        plans.append(len(defense.plan.entries))
    # A verdict may add phases; what follows it is known from there on.
    known = plans.index(plans[-1])
    assert known == 0 or when == "flagged"
    left = range(len(bounds) - 1, -1, -1)
    pairs = list(zip(bounds, left, strict=True))[known:]
    assert all(bound >= steps for bound, steps in pairs)
    assert bounds[-1] == 0


@short
@pytest.mark.parametrize("form", ["map", "weight"])
@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_reference_and_ratio_are_those_of_the_formulas(form: Any, statistics: Any) -> None:
    network, options = trained_network(), {"saliency": form, "statistics": statistics}
    defense = finished(new_defense(network, when="never", runs=1, verdict="ratio", **options))
    masked, data = defense.case.masked, defense.case.data
    batches = list(data.batches(16, torch.device("cpu")))
    correlations = []
    for weights in (masked.weights(), defense.case.suppression.weights):
        detached = {name: weight.detach() for name, weight in weights.items()}
        suppressed = bool(correlations)
        changes = approximate_clc(masked, detached, batches, form, suppressed=suppressed)
        magnitudes = filter_magnitudes(masked, detached)
        correlations.append(saliency_correlation(magnitudes, changes, defense.case.layers, form))
    [run] = defense.case.runs
    assert defense.case.correlation == pytest.approx(correlations[0], abs=1e-6)
    assert run.detection_ratio == pytest.approx(correlations[1] / correlations[0], abs=1e-6)
    with torch.no_grad():
        hits = (network(data.images).argmax(1) == data.labels).float().mean()
        parts = [masked(x, weights=detached, statistics=statistics).argmax(1) for x, _ in batches]
    assert defense.case.accuracy == pytest.approx(float(hits))
    assert list(run.predictions) == torch.cat(parts).bincount(minlength=4).tolist()
    assert defense.report().warnings == ([LITERAL_WARNING] if form == "weight" else [])


@short
def test_scores_are_the_mean_of_m1_plus_m2_over_the_runs() -> None:
    both = new_defense(runs=2, verdict="ratio")
    sums = []
    while not both.finished:
        at_masks = both.phase == "masks"
        both.step()
        if at_masks and both.phase != "masks":
            sums.append(both.case.penalty.values.detach() + both.case.preserving.values.detach())
    torch.testing.assert_close(both.case.scores, (sums[0] + sums[1]) / 2)


@short
def test_accuracy_after_is_that_of_the_pruned_network() -> None:
    defense = finished(new_defense())
    purified = defense.purified()
    images, labels = defense.case.data.images, defense.case.data.labels
    with torch.no_grad():
        hits = (purified(images).argmax(1) == labels).float().mean()
    assert defense.purification.accuracy == pytest.approx(float(hits))


@short
@pytest.mark.parametrize(
    ("verdict", "when", "pruned"),
    [
        ("clean", "flagged", False),
        ("undecided", "flagged", False),
        ("backdoored", "flagged", True),
        ("clean", "always", True),
    ],
)
def test_occasion_of_the_automatic_rule(
    monkeypatch: pytest.MonkeyPatch, verdict: Any, when: Any, pruned: bool
) -> None:
    judgement = Judgement(verdict, 0.5, 0.7, 0, ("a test says so",))
    monkeypatch.setattr("lightning_mnp.engine.case.judge", lambda *args, **options: judgement)
    defense = finished(new_defense(when=when, rule="auto", amount=0.05, harm=50.0, runs=1))
    assert bool(defense.report().pruned) == pruned


@short
def test_pruned_network_is_audited_again() -> None:
    changes = {"rule": "auto", "amount": 0.05, "harm": 50.0, "runs": 1, "reaudit": True}
    defense = finished(new_defense(**changes))
    report = defense.report()
    assert report.reaudit is not None
    options = {**changes, "reaudit": False}
    again = signals_to_repeat(defense.case.signals())
    second = new_defense(defense.purified(), when="never", signals=again, **options)
    expected = finished(second).report()
    assert {signal.name for signal in expected.signals} == again
    assert len(expected.runs) == ("pile-up" in again)
    assert report.reaudit.score == pytest.approx(expected.score)
    assert report.reaudit.verdict == expected.verdict
    assert report.reaudit.reasons == expected.reasons
    assert report.passes["reaudit"] == pytest.approx(sum(expected.passes.values()))


@short
def test_an_audit_of_some_signals_makes_a_suppression_run_only_for_the_pile_up() -> None:
    changes = {"when": "never", "rule": "auto", "amount": 0.05, "runs": 1}
    defense = new_defense(signals=frozenset({"patch"}), **changes)
    assert phases(defense) == ["reference", "patch", "verdict"]
    assert math.isnan(defense.judgement.detection_ratio)
    assert math.isnan(defense.report().pile_up)
    assert defense.report().to_dict()["detection_ratio"] is None
    pair = frozenset({"margin", "pile-up"})
    assert phases(new_defense(signals=pair, **changes)) == [
        "reference", "suppression", "saliency", "margin", "verdict",
    ]  # fmt: skip


@short
def test_repair_shifts_the_logits_of_all_but_the_suspect() -> None:
    defense = finished(new_defense(trained_network(), amount=44))
    plain = finished(new_defense(trained_network(), amount=44, repair=False))
    report = defense.report()
    suspect = defense.judgement.suspect
    assert report.pruning.shift[suspect] == 0.0
    assert sum(value != 0.0 for value in report.pruning.shift) == len(report.pruning.shift) - 1
    assert plain.report().pruning.shift == []
    images = defense.case.data.images
    with torch.no_grad():
        difference = defense.purified()(images) - plain.purified()(images)
    torch.testing.assert_close(difference, torch.tensor(report.pruning.shift).expand_as(difference))
    again = new_defense(trained_network(), amount=44)
    again.load_state_dict(defense.state_dict())
    assert again.report().pruning.shift == report.pruning.shift


AUTO = {"rule": "auto", "amount": 0.06, "harm": 50.0, "runs": 1, "tuning_steps": 0}


@short
def test_soft_masks_turns_down_what_is_left() -> None:
    defense = finished(at_soft_masks())
    report = defense.report()
    found = defense.purification.changes.kernel_masks
    assert found is not None
    left = report.pruning.masks
    assert list(left) == [layer.name for layer in defense.case.layers]
    told = f"{len(report.pruned)} of 88 filters pruned, {report.turned_down} turned down"
    assert told in str(report)
    assert len(report.pruned) > 0
    assert all(left[name][index] == 0 for name, index in report.pruned)
    assert report.turned_down == sum(0 < value < 0.99 for part in left.values() for value in part)
    assert min(value for part in left.values() for value in part if value > 0) < 1
    plain = finished(new_defense(trained_network(), constants=TURNING, **AUTO, soft_mask_steps=0))
    assert plain.report().pruning.masks == {}
    assert plain.report().pruned == report.pruned
    images = defense.case.data.images
    masked, filters = plain.case.masked, plain.purification.changes.filter_masks()
    with torch.no_grad(), masked.masking_kernels(found):
        logits = masked(images, masks=filters, statistics="running")
        expected = logits + torch.tensor(report.pruning.shift)
        torch.testing.assert_close(defense.purified()(images), expected, atol=1e-4, rtol=1e-4)


@functools.cache  # three tests share it
def state_at_soft_masks() -> dict[str, Any]:
    defense = new_defense(trained_network(), constants=TURNING, **AUTO)
    while defense.phase != "soft_masks":
        defense.step()
    return defense.state_dict()


def at_soft_masks() -> MNPDefense:
    defense = new_defense(trained_network(), constants=TURNING, **AUTO)
    defense.load_state_dict(copy.deepcopy(state_at_soft_masks()))
    return defense


@short
def test_soft_masks_that_does_harm_is_dropped_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    defense = at_soft_masks()
    assert defense.purification.greedy is not None
    pruned = defense.purification.greedy.harm_of(defense.purification.greedy.masks())
    assert pruned == pytest.approx(defense.purification.greedy.curve[-1][0], abs=1e-6)
    monkeypatch.setattr(defense.purification.greedy, "harm_of", lambda masks: pruned + 200.1)
    report = finished(defense).report()
    assert report.pruning.masks == {}
    [told] = [text for text in report.warnings if "turned down" in text]
    assert told == (
        "kernels were not turned down: all of it did 200 nats more harm than pruning, and 200, 4 "
        "times `pruning.harm`, is allowed"
    )


@short
def test_soft_masks_that_does_too_much_harm_is_turned_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = finished(at_soft_masks()).purification.changes.kernel_masks
    assert whole is not None
    defense = at_soft_masks()
    search, raised = defense.purification.greedy, defense.purification.raised
    assert search is not None
    pruned, begun = search.curve[-1][0], torch.ones_like(whole)

    def harm_of(masks: torch.Tensor) -> float:  # in proportion to how far kernels are turned down
        if raised.kernel_masks is None:
            return pruned
        return pruned + 316.0 * float((begun - raised.kernel_masks).sum() / (begun - whole).sum())

    monkeypatch.setattr(search, "harm_of", harm_of)
    report = finished(defense).report()
    share = 0.625  # the largest sixteenth below 200 / 316
    expected = torch.lerp(begun, whole, share)
    found = defense.purification.changes.kernel_masks
    assert found is not None
    torch.testing.assert_close(found, expected)
    [told] = [text for text in report.warnings if "turned down" in text]
    assert told == (
        "kernels were turned down by 62% of what was found: all of it did 316 nats more harm "
        "than pruning, and 200, 4 times `pruning.harm`, is allowed"
    )


@short
def test_a_rare_class_is_raised_for_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def found(logits: Tensor, labels: Tensor, constants: Any) -> dict[int, float]:
        seen.append((logits, labels))
        return {2: 1.5}

    monkeypatch.setattr("lightning_mnp.engine.phases.find_rare_classes", found)
    defense = finished(new_defense(when="never"))
    report = defense.report()
    [(logits, labels)] = seen
    images = defense.case.data.images
    with torch.no_grad():
        torch.testing.assert_close(logits, defense.case.model(images))
    assert labels.equal(defense.case.data.labels)
    assert report.rare_classes == {2: 1.5}
    assert any("class 2 is predicted far too rarely" in reason for reason in report.reasons)
    raised = defense.case.raised(images[:4]) - defense.case.masked(images[:4])
    expected = torch.tensor([0.0, 0.0, 1.5, 0.0]).expand_as(raised)
    torch.testing.assert_close(raised, expected, atol=1e-4, rtol=1e-4)
    again = new_defense(when="never")
    again.load_state_dict(defense.state_dict())
    assert again.report().rare_classes == report.rare_classes
    assert again.case.rare_classes == {2: 1.5}
    plain = finished(new_defense(when="never", raise_rare_classes=False))
    assert plain.report().rare_classes == {}
    assert plain.case.rare_classes == {}


@short
def test_each_run_sees_its_part_of_the_defense_set(monkeypatch: pytest.MonkeyPatch) -> None:
    defense = new_defense(runs=3, suppression_parts=2, augment="none")
    seen: dict[int, set[bytes]] = {}
    step = defense.case.suppression.step

    def watched(images: torch.Tensor, labels: Any, size: int, updates: Any) -> dict[str, float]:
        assert size == 20
        found = seen.setdefault(defense.run, set())
        found.update(image.numpy().tobytes() for image in images)
        return step(images, labels, size, updates)

    monkeypatch.setattr(defense.case.suppression, "step", watched)
    finished(defense)
    everything = {image.numpy().tobytes() for image in defense.case.data.images}
    assert [len(seen[run]) for run in range(3)] == [20, 20, 20]
    assert seen[0] | seen[1] == everything
    assert seen[2] not in (seen[0], seen[1])


@short
def test_few_images_are_not_parted() -> None:
    data = DefenseSet(*images_and_labels(5))
    defense = MNPDefense(trained_network(), data, quick_config(runs=1), when="never")
    assert suppression_parts(data, defense.case.config) == 1
    assert finished(defense).report().runs[0].steps > 0


@short
def test_a_network_without_a_bias_is_not_repaired() -> None:
    network = trained_network()
    network.fc = nn.Linear(network.fc.in_features, 4, bias=False)
    assert finished(new_defense(network)).report().pruning.shift == []


@short
def test_purified_network_that_is_still_flagged_is_told() -> None:
    changes = {"rule": "auto", "amount": 0.05, "harm": 50.0, "runs": 1, "reaudit": True}
    report = finished(new_defense(threshold=1e-3, **changes)).report()
    assert report.reaudit is not None
    assert report.reaudit.verdict == "backdoored"
    assert "audited again after pruning, the network is backdoored" in report.warnings[-1]
    assert "The purified copy was audited again: backdoored." in str(report)
    unjudged = finished(new_defense(constants=None, **changes)).report()
    assert unjudged.reaudit is not None
    assert unjudged.reaudit.verdict == "undecided"
    assert "is undecided: the defense set has 40 images" in unjudged.warnings[-1]


@short
def test_nothing_pruned_nothing_audited_again() -> None:
    changes = {"rule": "auto", "amount": 0.05, "harm": 1e-9, "soft_mask_steps": 0}
    defense = finished(new_defense(runs=1, reaudit=True, **changes))
    assert (len(defense.purification.changes.removed) == 0) == (defense.report().reaudit is None)
    assert finished(new_defense(rule="count", amount=0, reaudit=True)).report().reaudit is None


@short
def test_results_need_a_finished_defense() -> None:
    defense = new_defense()
    for result in (defense.report, defense.purified, defense.prune_):
        with pytest.raises(RuntimeError, match="The defense is in phase 'reference'"):
            result()
    finished(defense)
    with pytest.raises(RuntimeError, match="there is no step left"):
        defense.step()


@short
def test_unknown_occasion() -> None:
    with pytest.raises(ValueError, match="Expected argument `when` to be one of"):
        new_defense(when="sometimes")


@short
def test_state_is_readable_with_weights_only(tmp_path: Any) -> None:
    defense = new_defense(rule="auto", amount=0.02, runs=1)
    number = 0
    while not defense.finished:
        defense.step()
        number += 1
        if number % 7 == 0:
            torch.save(defense.state_dict(), tmp_path / "state.pt")
            torch.load(tmp_path / "state.pt", weights_only=True)


def states_of(changes: dict[str, Any]) -> tuple[dict[str, tuple[int, dict[str, Any]]], MNPDefense]:
    """In each phase twice, before its second step and after its last: steps taken, and state."""
    defense, steps = new_defense(constants=TURNING, **changes), 0
    states: dict[str, tuple[int, dict[str, Any]]] = {}
    while not defense.finished:
        phase = defense.phase
        defense.step()
        steps += 1
        moment = f"{phase}, finished: {phase != defense.phase}"
        if moment not in states:
            states[moment] = steps, copy.deepcopy(defense.state_dict())
    assert len(states) >= 14
    assert ("soft_masks, finished: False" in states) == (changes.get("rule") == "auto")
    return states, defense


def assert_same_state(found: Any, expected: Any, where: str) -> None:
    """Compare all but the clock, and what a resumed run does again."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected.keys() - {"seconds", "passes"}:
            assert_same_state(found[name], expected[name], f"{where}, {name}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_state(one, other, f"{where}, {index}")
    else:
        assert found == expected, where


BOTH_RULES = pytest.mark.parametrize("changes", [{}, {"rule": "auto", "amount": 0.1, "runs": 1}])


@short
@BOTH_RULES
def test_resumed_at_any_step_goes_on_to_the_same_state(changes: dict[str, Any]) -> None:
    states, defense = states_of(changes)
    moments = list(states.values())
    for moment, (steps, state), (goal, expected) in zip(states, moments, moments[1:], strict=False):
        second = new_defense(constants=TURNING, **changes)
        second.load_state_dict(state)
        for _ in range(steps, goal):
            second.step()
        assert_same_state(second.state_dict(), expected, f"from {moment} on")
    assert lasting(second.report()) == lasting(defense.report())


@short
@pytest.mark.slow
@BOTH_RULES
def test_resumed_at_any_step_ends_the_same(changes: dict[str, Any]) -> None:
    states, defense = states_of(changes)
    for moment, (_, state) in states.items():
        second = new_defense(constants=TURNING, **changes)
        second.load_state_dict(state)
        assert lasting(finished(second).report()) == lasting(defense.report()), moment


@short
def test_masks_that_stop_early_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite loss of one mask ends its optimization and leaves a warning."""
    defense = new_defense(runs=1, verdict="ratio")
    original = F.cross_entropy

    def spoiled(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        return original(logits, labels, **options) * float("inf")

    while defense.phase != "masks":
        defense.step()
    monkeypatch.setattr("lightning_mnp.mnp.dual_masks.F.cross_entropy", spoiled)
    finished(defense)
    assert len(defense.report().warnings) == 2
    assert "M1 of run 1 stopped early: the loss became inf" in defense.report().warnings[0]


@short
def test_autocast_is_used_in_every_pass() -> None:
    images, labels = images_and_labels()
    entered = 0

    class Counting:
        def __enter__(self) -> None:
            nonlocal entered
            entered += 1

        def __exit__(self, *args: Any) -> None:
            pass

    config = quick_config(runs=1)
    defense = MNPDefense(
        trained_network(),
        DefenseSet(images, labels),
        config,
        when="never",
        autocast=Counting,
        constants=JUDGED,
    )
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    defense.case.model.register_forward_pre_hook(count)
    finished(defense)
    assert calls > 50
    assert entered == calls
