from __future__ import annotations

import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import no_more_than
from helpers import images_and_labels, loader, quick_config, same, snapshot
from killing import defend_until, new_defense, small_network
from torch import Tensor, nn

import lightning_mnp
from lightning_mnp import DefenseReport, DefenseSet, MNPDefense
from lightning_mnp.engine.runner import run_defense

# Both rules for pruning, so that there is every phase.
MASKS: dict[str, Any] = {"runs": 1, "amount": 2}
SEARCH: dict[str, Any] = {"reaudit": True, "runs": 1, "rule": "auto", "amount": 0.5}


def outcome(defense: MNPDefense) -> tuple[dict[str, Any], Tensor]:
    """What has to be the same bit for bit: report without its clock, and masks."""
    report = defense.report().to_dict()
    del report["seconds"], report["passes"], report["date"]
    return report, defense.case.masks_sum


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, tuple[dict[str, Any], Tensor]]:
    found = {}
    for name, changes in (("masks", MASKS), ("search", SEARCH)):
        defense = new_defense(changes)
        run_defense(defense)
        found[name] = outcome(defense)
    return found


# kill -9


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that have imported PyTorch already: one import for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_mnp.api", "lightning_mnp.models"])
    return context


KILLS = [
    ("masks", "suppression", "step"),
    ("search", "pruning", "step"),
    ("masks", "masks", "unsynced"),
    # The same at other moments, and in all other phases.
    *(
        pytest.param(*kill, marks=pytest.mark.slow)
        for kill in (
            ("masks", "masks", "half"),
            ("masks", "masks", "whole"),
            ("masks", "reference", "step"),
            ("masks", "masks", "step"),
            ("search", "margin", "step"),
            ("search", "reaudit", "step"),
            ("masks", "saliency", "step"),
            ("search", "reach", "step"),
            ("search", "patch", "step"),
            ("search", "overlay", "step"),
            ("search", "warp", "step"),
            ("masks", "permutation", "step"),
            ("masks", "verdict", "step"),
            ("masks", "pruning", "step"),
            ("masks", "check", "step"),
            ("search", "soft_masks", "step"),
            ("search", "tuning", "step"),
            ("search", "check", "whole"),
        )
    ),
]


@pytest.mark.parametrize(("rule", "phase", "moment"), KILLS)
def test_killed_process_goes_on_to_the_same_masks(
    tmp_path: Path,
    processes: Any,
    undisturbed: dict[str, tuple[dict[str, Any], Tensor]],
    rule: str,
    phase: str,
    moment: str,
) -> None:
    state, changes = tmp_path / "state.pt", {"masks": MASKS, "search": SEARCH}[rule]
    process = processes.Process(target=defend_until, args=(changes, state, phase, moment))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert state.exists() == (phase != "reference")

    defense = new_defense(changes)
    run_defense(defense, state_file=state)

    report, masks = outcome(defense)
    assert report == undisturbed[rule][0]
    assert torch.equal(masks, undisturbed[rule][1])
    assert list(tmp_path.iterdir()) == [state]


@pytest.mark.slow  # a single kill is tested above
def test_killed_again_and_again(
    tmp_path: Path, processes: Any, undisturbed: dict[str, tuple[dict[str, Any], Tensor]]
) -> None:
    state = tmp_path / "state.pt"
    for phase, moment in (("suppression", "step"), ("saliency", "half"), ("masks", "step")):
        process = processes.Process(target=defend_until, args=(MASKS, state, phase, moment))
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    report = lightning_mnp.defend(
        small_network(),
        DefenseSet(*images_and_labels()),
        when="always",
        config=quick_config(**MASKS),
        state_file=state,
    ).to_dict()
    del report["seconds"], report["passes"], report["date"]
    assert report == undisturbed["masks"][0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "flipped", "another file", "incomplete", "list"]
)
def test_damaged_state_file_is_told_and_kept(tmp_path: Path, damage: str) -> None:
    state = tmp_path / "state.pt"
    torch.save(new_defense(MASKS).state_dict(), state)
    data = bytearray(state.read_bytes())
    if damage == "another file":
        torch.save(small_network().state_dict(), state)
    elif damage == "incomplete":
        content = new_defense(MASKS).state_dict()
        del content["case"]
        torch.save(content, state)
    elif damage == "list":
        torch.save([1], state)
    else:
        data[data.index(b"position")] ^= 1  # where a checksum sees it
        length = {"empty": 0, "cut": len(data) // 2, "flipped": len(data)}[damage]
        state.write_bytes(data[:length])
    before = state.read_bytes()
    with pytest.raises(ValueError, match=r"Remove the file to start\s+anew"):
        run_defense(new_defense(MASKS), state_file=state)
    assert state.read_bytes() == before
    assert list(tmp_path.iterdir()) == [state]


# Ctrl-C


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that runs in code of this package or PyTorch's."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if "lightning_mnp" in name or name.endswith(
            ("stateless.py", "_named_member_accessor.py", "contextlib.py")
        ):
            return self.line
        return None

    def line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.line


def interrupted(action: Callable[[], Any], at: int) -> bool:
    """Run something; whether it was interrupted before its end."""
    earlier = sys.gettrace()
    sys.settrace(Interrupter(at))
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(earlier)
    return False


# An interrupt in the cleanup of a generator, which Python does by itself, is lost there.
LOST = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <generator:pytest.PytestUnraisableExceptionWarning"
)


@LOST
@pytest.mark.parametrize(
    ("rule", "phase"),
    [
        *(("count", phase) for phase in ("reference", "suppression", "saliency", "masks")),
        *(("count", phase) for phase in ("margin", "patch", "warp", "permutation", "check")),
        *(("auto", phase) for phase in ("reach", "overlay")),  # for pruning by that rule only
    ],
)
def test_interrupt_anywhere_in_a_step_leaves_the_model(rule: str, phase: str) -> None:
    network = small_network()
    before, weights = snapshot(network), list(network.parameters())
    data = DefenseSet(*images_and_labels(12))
    config = quick_config(runs=1, rule=rule, amount=2 if rule == "count" else 0.5)
    defense = MNPDefense(network, data, config, when="always")
    while defense.phase != phase:
        defense.step()
    at = 1
    while defense.phase == phase and interrupted(defense.step, at):
        assert same(before, snapshot(network)), at
        assert all(a is b for a, b in zip(weights, network.parameters(), strict=True)), at
        at += 1 + at // 12
    assert at > 50  # there were that many chances at least


@LOST
def test_interrupt_anywhere_in_pruning_prunes_all_or_nothing() -> None:
    network = small_network()
    data = DefenseSet(*images_and_labels(12))
    defense = MNPDefense(network, data, quick_config(runs=1, amount=2), when="always")
    run_defense(defense)
    before = snapshot(network)
    at = 1
    while interrupted(defense.prune_, at):
        assert same(before, snapshot(network)), at
        at += 1 + at // 20
    assert not same(before, snapshot(network))


def test_interrupted_call_leaves_a_usable_state_file(tmp_path: Path) -> None:
    network, state = small_network(), tmp_path / "state.pt"
    before = snapshot(network)
    data = DefenseSet(*images_and_labels())
    reference = MNPDefense(small_network(), data, quick_config(**MASKS))
    run_defense(reference)

    def interrupt(defense: MNPDefense, phase: str, numbers: dict[str, float]) -> None:
        if phase == "masks":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_defense(
            MNPDefense(network, data, quick_config(**MASKS)), state_file=state, observe=interrupt
        )
    assert same(before, snapshot(network))
    assert list(tmp_path.iterdir()) == [state]
    resumed = MNPDefense(network, data, quick_config(**MASKS))
    run_defense(resumed, state_file=state)
    assert torch.equal(resumed.case.masks_sum, reference.case.masks_sum)


def test_interrupt_while_the_state_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        run_defense(new_defense(MASKS), state_file=tmp_path / "state.pt")
    assert list(tmp_path.iterdir()) == []


# Full disks and unwritable places


def test_state_file_in_an_unwritable_place_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    defense = new_defense(MASKS)
    with pytest.raises(OSError, match="`state_file` to be where files can be written"):
        run_defense(defense, state_file=tmp_path / "file" / "state.pt")
    assert defense.phase == "reference"


def test_disk_that_fills_up_does_not_end_the_run(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    reference, defense = new_defense(MASKS), new_defense(MASKS)
    run_defense(reference)
    with (
        no_more_than(5_000),
        pytest.warns(UserWarning, match=r"`state_file`: .* could not be written.*The run goes on"),
    ):
        run_defense(defense, state_file=state)
    assert torch.equal(defense.case.masks_sum, reference.case.masks_sum)
    # What was small enough is there, whole; nothing is there by half.
    assert {path.name for path in tmp_path.iterdir()} <= {"state.pt"}


def test_state_before_the_disk_was_full_is_kept(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"

    def fill(defense: MNPDefense, phase: str, numbers: dict[str, float]) -> None:
        if phase == "masks":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_defense(new_defense(MASKS), state_file=state, observe=fill)
    before = state.read_bytes()
    with no_more_than(5_000), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run_defense(new_defense(MASKS), state_file=state)
    assert state.read_bytes() == before


# Out of memory


class Greedy(nn.Module):
    """Needs more memory than there is for more images than so many."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.network = small_network()
        self.most = most
        self.error = error

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise self.error
        return self.network(images)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_batch(error: Exception, tmp_path: Path) -> None:
    network = Greedy(10, error)
    before = snapshot(network)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        lightning_mnp.audit(network, loader(), config=quick_config(), state_file=tmp_path / "s.pt")
    assert str(caught.value) == (
        "Out of memory in phase 'reference', run 1, in a batch of 14 images (`batch_size` is 16). "
        "The model is unchanged. Choose a smaller `batch_size`, for example 7; a `state_file` of "
        "the larger one cannot be used then."
    )
    assert caught.value.__cause__ is error
    assert same(before, snapshot(network))
    assert list(tmp_path.iterdir()) == []
    assert lightning_mnp.audit(network, loader(), config=quick_config(batch_size=7)).runs


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")], ids=repr
)
def test_too_little_memory_for_two_images(error: Exception) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Out of memory on 2 images"):
        lightning_mnp.audit(Greedy(1, error), loader(), config=quick_config())


# Data loaders


class Failing:
    """A loader that says it has three batches, and yields as many as it likes."""

    def __init__(self, batches: int, error: Exception | None = None) -> None:
        self.batches = batches
        self.error = error

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.batches):
            yield images_and_labels(8)
        if self.error is not None:
            raise self.error


def uneven(second: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [images_and_labels(8), second]


IMAGES, LABELS = images_and_labels(8)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (Failing(2, OSError("disk gone")), "but it raised OSError after 2: disk gone"),
        (Failing(0, KeyError("x")), "but it raised KeyError after 0: 'x'"),
        (Failing(2), r"to yield 3 batches, as its length says, but it ended after 2\."),
        (Failing(0), "to yield 3 batches, as its length says, but it ended after 0"),
        (iter([]), "yields no batch"),
        (uneven((IMAGES[..., 1:], LABELS)), r"one shape, but got \(1, 8, 8\) and, in batch 1, "),
        (
            uneven((IMAGES[1:], LABELS)),
            r"one label for each image.*\(7, 1, 8, 8\).*\(8,\) in batch",
        ),
        (uneven((IMAGES, LABELS[:, None])), r"one label for each image.*labels of shape \(8, 1\)"),
        (uneven((IMAGES.double(), LABELS)), r"of one type, but got torch\.float32 and, in batch 1"),
        ([(IMAGES[1:], LABELS), (IMAGES, LABELS[1:])], "one label for each image.*in batch 0"),
    ],
)
def test_loader_at_fault_is_told(batches: Any, message: str) -> None:
    network = small_network()
    before, random = snapshot(network), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        lightning_mnp.defend(network, batches, when="always", config=quick_config())
    assert same(before, snapshot(network))
    assert torch.equal(random, torch.get_rng_state())


def test_batches_of_any_size_are_one_defense_set() -> None:
    images, labels = images_and_labels()
    sizes = [1, 17, 0, 22]
    parts = zip(images.split(sizes), labels.split(sizes), strict=True)
    assert DefenseSet.from_loader(list(parts)).fingerprint == DefenseSet(images, labels).fingerprint


def test_interrupt_while_loading_passes() -> None:
    class Slow(Failing):
        def __iter__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DefenseSet.from_loader(Slow(1))


def test_unpack_at_fault_is_told() -> None:
    with pytest.raises(ValueError, match=r"`unpack` to return images.*on batch 0 it raised Key"):
        DefenseSet.from_loader([{}], unpack=lambda batch: (batch["a"], batch["b"]))


def test_defense_set_beyond_memory_is_told() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"while reading the defense set\. Pass a"):
        DefenseSet.from_loader(Failing(1, MemoryError()))


def test_reports_compare_by_content() -> None:
    """The comparison above can fail."""
    first = DefenseReport("clean", score=0.5).to_dict()
    assert first != DefenseReport("clean", score=0.5000001).to_dict()
