from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_site import make_site

from lightning_mnp.benchmark.grid import Cell, Grid, cells_of
from lightning_mnp.benchmark.methods import Method
from lightning_mnp.signals.population import SCORES_FORMAT


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_site(tmp_path)


def test_everything_is_combined_network_by_network(base: Path) -> None:
    grid = Grid(
        ["clean", "badnets"],
        ["clp", Method("clp", {"u": 2.0})],
        ["mm-bd"],
        seeds=[0, 1],
        defense_seeds=[4, 5],
        defense_sizes=[8, 16],
        widths=[2, 3],
    )
    cells = cells_of([grid], base)
    assert len(cells) == 2 * 3 * 2 * 2 * 2 * 2
    assert len({cell.digest for cell in cells}) == len({cell.name for cell in cells}) == len(cells)
    networks = [cell.network for cell in cells]
    changes = sum(one != other for one, other in itertools.pairwise(networks))
    assert changes == 2 * 2 * 2 - 1
    assert {(cell.seed, cell.size) for cell in cells} == {(4, 8), (4, 16), (5, 8), (5, 16)}


def test_a_cell_of_two_grids_comes_once(base: Path) -> None:
    grids = [Grid(["badnets"], ["clp", "ft"]), Grid(["badnets"], ["ft", "nad"])]
    assert [cell.method.name for cell in cells_of(grids, base)] == ["clp", "ft", "nad"]


def test_poison_rates_and_modes(base: Path) -> None:
    grid = Grid(["badnets"], ["clp"], poison_rates=[0.5, None], modes=["all-to-all"])
    told = [cell.network.described() for cell in cells_of([grid], base)]
    assert [(each["rate"], each["mode"]) for each in told] == [
        (0.5, "all-to-all"),
        (0.25, "all-to-all"),
    ]


def test_fine_tuning_is_for_the_networks_of_its_grid(base: Path) -> None:
    tuning = {"trainer.max_epochs": 3}
    grids = [
        Grid(["clean", "badnets"], ["clp"], fine_tuning=tuning),
        Grid(["clean", "badnets"], ["clp"]),
    ]
    told = [cell.network.described() for cell in cells_of(grids, base)]
    assert [(each["attack"], each["fine_tuning"]) for each in told] == [
        ("clean", {}),
        ("badnets", tuning),
        ("badnets", {}),
    ]


def test_a_cell_is_described_by_primitives(base: Path) -> None:
    [cell] = cells_of([Grid(["badnets"], detectors=["strip"])], base, test_images=7, suspects=9)
    told = cell.described()
    assert json.loads(json.dumps(told)) == told
    assert (told["task"], told["test_images"], told["suspects"]) == ("detector", 7, 9)
    assert cell.name == f"badnets-strip-detector-{cell.digest}"


def test_names_of_files_are_plain(base: Path) -> None:
    [cell] = cells_of([Grid(["badnets"], [Method("anp", {"rule": "number", "amount": 30})])], base)
    assert cell.name == f"badnets-anp-amount-30-rule-number-defense-{cell.digest}"


def test_a_long_label_makes_a_name_that_a_file_can_have(base: Path) -> None:
    options = {
        "verdict.threshold": 1.5,
        "suppression.runs": 4,
        "suppression.epochs": 20,
        "suppression.mu": 0.01,
        "pruning.amount": 0.0125,
        "pruning.rule": "share",
        "pruning.tuning_steps": 100,
        "pruning.soft_mask_steps": 200,
        "masks.penalty": 0.001,
    }
    many = [Method("default", {**options, "masks.epochs": epochs}) for epochs in (3, 4)]
    cells = cells_of([Grid(["badnets"], many)], base)
    assert all(len(cell.name) < 200 for cell in cells)
    assert len({cell.name for cell in cells}) == 2


def test_a_file_that_an_option_names_is_a_part_of_the_digest(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    grid = Grid(["clean"], detectors=[Method("default", {"verdict.reference": str(file)})])
    digests = []
    for score in (0.5, 0.5, 0.7):
        networks = [{"weights": "a", "score": score}]
        file.write_text(json.dumps({"format": SCORES_FORMAT, "networks": networks}))
        digests.append(cells_of([grid], base)[0].digest)
    assert digests[0] == digests[1] != digests[2]


def test_the_number_of_suspects_counts_only_if_there_are_any(base: Path) -> None:
    def digest(method: str, suspects: int) -> str:
        [cell] = cells_of([Grid(["badnets"], detectors=[method])], base, suspects=suspects)
        return cell.digest

    assert digest("mm-bd", 10) == digest("mm-bd", 20)
    assert digest("ac", 10) != digest("ac", 20)


def test_where_the_base_lies_is_of_no_account(base: Path, tmp_path: Path) -> None:
    other = make_site(tmp_path / "other")
    grid = Grid(["badnets"], ["clp"])
    one: list[Cell] = cells_of([grid], base)
    assert one[0].digest == cells_of([grid], other)[0].digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defenses": []}, "at least one of `defenses` or `detectors`, but it has neither"),
        ({"attacks": []}, "Expected `attacks` of a grid not to be empty"),
        ({"seeds": [1, 1]}, r"`seeds` of a grid to name each once, but got \[1, 1\]"),
        ({"defenses": ["ft", "ft"]}, "`defenses` of a grid to name each once"),
        ({"seeds": [-1]}, "`seeds` of a grid to be at least 0, but got -1"),
        ({"defense_sizes": [1]}, "`defense_sizes` of a grid to be at least 2, but got 1"),
        ({"widths": [0]}, "`widths` of a grid to be at least 1, but got 0"),
        ({"poison_rates": [1.5]}, r"`poison_rates` of a grid to be from 0 to 1, but got 1\.5"),
        (
            {"fine_tuning": {"trainer.max_epochs": 3}},
            "`fine_tuning` to have an attack, but it has clean networks only.*Leave `fine_tuning`",
        ),
        ({"modes": ["all"]}, "`modes` of a grid to be 'all-to-one' or 'all-to-all', but got 'all'"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**{"attacks": ["clean"], "defenses": ["ft"], **changes})


def test_an_unknown_method_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match=r"but got 'anpp'. Did you mean 'anp'\?"):
        cells_of([Grid(["badnets"], ["anpp"])], base)


def test_an_unknown_attack_is_refused_before_its_first_cell(base: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'badnets'"):
        cells_of([Grid(["clean", "badnet"], ["anp"])], base)
