from __future__ import annotations

from typing import Any

import pytest

from lightning_mnp.benchmark.training_options import check_fine_tuning, check_option

CONTENT: dict[str, Any] = {
    "model": {"class_path": "lightning_mnp.models.Classifier"},
    "data": {"class_path": "lightning_mnp.data.CIFAR10DataModule"},
    "trainer": {},
}


@pytest.mark.parametrize(
    "name", ["trainer.max_epochs", "model.lr", "data.root", "data.attack.poison_rate"]
)
def test_what_trainer_model_and_data_take(name: str) -> None:
    check_option(CONTENT, name, "options")


@pytest.mark.parametrize("part", ["options", "fine_tuning"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.widths", "that Classifier takes, but got 'model.widths'. Did you mean 'width'?"),
        ("trainer.max_epoch", "that Trainer takes, but got 'trainer.max_epoch'. Did you mean 'max"),
        ("models.width", "to begin with trainer., model. or data., but got 'models.width'. Did yo"),
        ("trainer", "to begin with trainer., model. or data., but got 'trainer'."),
        ("model.checkpoint", "but got 'model.checkpoint': a benchmark names the network to start"),
    ],
)
def test_mistakes(part: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match="Expected an option of the training in") as caught:
        check_option(CONTENT, name, part)
    assert f"in `{part}`" in str(caught.value)
    assert message in str(caught.value)


def test_fine_tuning_leaves_the_shape() -> None:
    check_fine_tuning(CONTENT, ["model.lr", "trainer.max_epochs"])
    for name in ("width", "architecture", "num_classes", "in_channels", "network"):
        with pytest.raises(ValueError, match=rf"'model\.{name}'\. Give it in `options`"):
            check_fine_tuning(CONTENT, ["model.lr", f"model.{name}"])


def test_fine_tuning_needs_a_model_that_takes_weights() -> None:
    content = {**CONTENT, "model": {"class_path": "benchmark_site.Untunable"}}
    with pytest.raises(ValueError, match=r"an argument `checkpoint`.*but Untunable takes none"):
        check_fine_tuning(content, ["trainer.max_epochs"])
