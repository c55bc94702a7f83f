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


def test_classes_are_chosen_once() -> None:
    scene = new_scene(tried=())
    scene.choose_classes()
    assert sorted(scene.tried) == [0, 1, 2, 3]
    tried = list(scene.tried)
    scene.runs.append(run(tried[-1]))
    scene.choose_classes()
    assert scene.tried == tried
