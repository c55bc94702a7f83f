from __future__ import annotations

from helpers import new_scene

from lightning_mnp.report import RunResult


def run(top: int) -> RunResult:
    return RunResult(0.5, 0.3, tuple(9 if index == top else 1 for index in range(12)), 9, 0.2, "")


def test_suspected_classes_come_first_and_none_twice() -> None:
    chosen = []
    for _ in range(2):
        scene = new_scene(tried=(), most_classes=10, seed=3)
        scene.classes = 12
        scene.runs += [run(5), run(2), run(5)]
        scene.choose_classes()
        chosen.append(list(scene.tried))
    assert chosen[0][:2] == [5, 2]
    assert len(set(chosen[0])) == len(chosen[0]) == scene.most_tried == 10
    assert chosen[0] == chosen[1]


def test_all_classes_are_tried_in_order_whatever_the_runs_say() -> None:
    scene = new_scene(tried=())
    scene.runs.append(run(2))
    scene.choose_classes([3])
    assert scene.tried == [0, 1, 2, 3]


def test_classes_are_chosen_once() -> None:
    scene = new_scene(tried=(), most_classes=3)
    scene.choose_classes()
    tried = list(scene.tried)
    assert len(set(tried)) == 3
    scene.runs.append(run(({0, 1, 2, 3} - set(tried)).pop()))
    scene.choose_classes()
    assert scene.tried == tried
