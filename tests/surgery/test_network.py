from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mnp.surgery.forward import NoLogitsError, call_network
from lightning_mnp.surgery.network import (
    check_copy,
    check_network,
    copy_network,
    network_forward,
    weights_digest,
)

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1])


def classifier(classes: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, classes)
    )


class Plain(L.LightningModule):
    """Without a forward: its network is found among its submodules."""

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()
        for name, network in (networks or {"net": classifier()}).items():
            setattr(self, name, network)


class WithForward(Plain):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(2 * x)
        return logits


def traces(model: nn.Module) -> tuple[Any, ...]:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return (
        buffer.getvalue(),
        [(module.training, len(module._forward_hooks)) for module in model.modules()],
        [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        torch.get_rng_state().tolist(),
    )


# --- which network -----------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Plain, WithForward])
def test_a_lightning_module(base: type[Plain]) -> None:
    model = base().eval()
    factor = 2 if base is WithForward else 1
    logits = network_forward(model)(model, IMAGES)
    torch.testing.assert_close(logits, model.net(factor * IMAGES))


def test_a_network_of_its_own() -> None:
    model = classifier().eval()
    assert torch.equal(network_forward(model)(model, IMAGES), model(IMAGES))


def test_a_forward_of_lightnings_own_package() -> None:
    model = BoringModel()
    x = torch.rand(2, 32)
    assert torch.equal(network_forward(model)(model, x), model(x))


def test_a_forward_of_the_instance() -> None:
    model = Plain(a=classifier(), b=classifier()).eval()
    model.forward = lambda x: model.b(x)
    assert torch.equal(network_forward(model)(model, IMAGES), model.b(IMAGES))


@pytest.mark.parametrize("path", ["b", "b.net"])
def test_a_named_network(path: str) -> None:
    inner = nn.Sequential()
    inner.net = classifier()
    model = Plain(a=classifier(), b=inner).eval()
    inner.add_module("last", nn.Identity())
    found = network_forward(model, path)(model, IMAGES)
    assert torch.equal(found, model.get_submodule(path)(IMAGES))
    assert not torch.equal(found, model.a(IMAGES))


def test_a_network_with_two_names() -> None:
    model = Plain(a=classifier(), other=nn.Linear(2, 2)).eval()
    model.b = model.a
    assert torch.equal(network_forward(model, "b")(model, IMAGES), model.a(IMAGES))


def test_a_function_that_calls_the_network() -> None:
    def forward(network: nn.Module, images: Tensor) -> Any:
        assert network is model.net
        return {"logits": network(3 * images)}

    model = Plain().eval()
    found = network_forward(model, forward=forward)(model, IMAGES)
    assert torch.equal(found["logits"], model.net(3 * IMAGES))


def test_logits_are_found_in_the_output() -> None:
    class Tupled(Plain):
        def forward(self, x: Tensor) -> Any:
            return self.net(x), x

    model = Tupled().eval()
    assert torch.equal(network_forward(model)(model, IMAGES), model.net(IMAGES))


def test_the_same_function_serves_a_copy() -> None:
    model, copy = Plain().eval(), Plain().eval()
    assert torch.equal(network_forward(model)(copy, IMAGES), copy.net(IMAGES))


def test_an_unknown_name() -> None:
    message = (
        "`network` to name a submodule of Plain, but got 'nett'. Its submodules are 'loss', 'net'"
    )
    with pytest.raises(ValueError, match=message):
        network_forward(Plain(), "nett")
    with pytest.raises(ValueError, match="Its submodules are none"):
        network_forward(nn.Identity(), "x")


@pytest.mark.parametrize(
    ("networks", "found"),
    [
        ({"a": classifier(), "b": classifier()}, r"\['a', 'b'\]"),
        ({"a": nn.ReLU()}, "none"),
    ],
)
def test_a_network_that_cannot_be_told(networks: dict[str, nn.Module], found: str) -> None:
    message = (
        f"exactly one submodule with parameters, but it has {found}. Name one with .*`network`"
    )
    with pytest.raises(ValueError, match=message):
        network_forward(Plain(**networks))


# --- checks ------------------------------------------------------------------------------------


def check(model: nn.Module, images: Tensor = IMAGES, labels: Tensor = LABELS) -> int:
    return check_network(model, images, labels, call_network)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_number_of_classes(classes: int) -> None:
    assert check(classifier(classes)) == classes


def broken_weight(model: nn.Sequential) -> nn.Module:
    with torch.no_grad():
        model[0].weight[1, 2, 0, 0] = math.nan
    return model


def broken_statistics(model: nn.Sequential) -> nn.Module:
    model[1].running_var[2] = math.inf
    return model


def overflowing(model: nn.Sequential) -> nn.Module:
    model[1].running_var.fill_(-1.0)
    return model


def lazy(model: nn.Sequential) -> nn.Module:
    model[4] = nn.LazyLinear(2)
    return model


class Answering(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.answer = nn.Linear(1, 1), answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x)


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * mask


class WithoutGradient(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*classifier(3))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = classifier(3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def failing(error: BaseException) -> nn.Module:
    def answer(x: Tensor) -> Tensor:
        torch.rand(1)
        raise error

    return Answering(answer)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Flatten(), "to have parameters, but Flatten has none"),
        (broken_weight(classifier()), "finite, but '0.weight' holds NaN or infinity"),
        (broken_statistics(classifier()), "finite, but '1.running_var' holds NaN or infinity"),
        (overflowing(classifier()), "outputs on the defense set to be finite, but some are NaN"),
        (
            nn.Sequential(classifier(4), nn.Softmax(1)),
            r"outputs look like probabilities: .* part before the softmax with the argument `netwo",
        ),
        (WithoutGradient(), "gradients to lead from the model's outputs to its images"),
        (
            Checkpointed(False),
            "not to run again while gradients are computed, but Sequential did",
        ),
        (
            Checkpointed(True),
            r"gradients of the model's outputs, but computing them failed: .* turn it off",
        ),
        (lazy(classifier()), "'4' is a lazy module that has not seen data. Run one batch"),
        (nn.Linear(7, 2), r"images of shape \(3, 8, 8\) and torch.float32, .* it failed: mat1"),
        (
            classifier().double(),
            r"torch\.float32, as the defense set has them, but it failed: .* weights are "
            r"torch\.float64: make it `model\.to\(torch\.float32\)`",
        ),
        (nn.BatchNorm1d(3), r"it failed: expected 2D or 3D input \(got 4D input\)"),
        (
            failing(IndexError("out of range\nmore")),
            r"it failed: out of range\. Transform .*`forward`",
        ),
        (failing(AssertionError()), r"it failed: AssertionError\. Transform the images as in"),
        (TwoInputs(1, 1), r"it failed: .*missing 1 .* 'mask'\. .* argument `forward` a function"),
        (classifier(1), "at least two classes, but got 1"),
        (Answering(lambda x: torch.zeros(3, 2)), "each of 2 images, but got 3"),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_models_that_do_not_fit(model: nn.Module, message: str) -> None:
    model.train()
    before = None if "lazy" in message else traces(model)
    with pytest.raises(ValueError, match=message):
        check(model)
    assert before is None or traces(model) == before


def test_a_lazy_layer_stays_lazy() -> None:
    model = lazy(classifier())
    with pytest.raises(ValueError, match="lazy"):
        check(model)
    assert model[4].has_uninitialized_params()  # type: ignore[index]


def test_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"labels to be below 2, the model's number of .* got 7"):
        check(classifier(), labels=torch.tensor([0, 7, 1]))


def test_outputs_without_logits() -> None:
    with pytest.raises(NoLogitsError, match="to return logits"):
        check(Answering(lambda x: {"a": x}))  # type: ignore[arg-type, return-value]


def test_nothing_is_changed() -> None:
    class Noisy(Plain):
        def __init__(self, **modules: nn.Module) -> None:
            super().__init__(**modules)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = x.add_(1) * torch.rand(())
            logits: Tensor = self.net(x)
            return logits

    model, images = Noisy().train(), IMAGES.clone()
    model.net[0].eval().requires_grad_(False)
    before = traces(model)
    assert check(model, images) == 2
    assert traces(model) == before
    assert torch.equal(images, IMAGES)


# --- digest ------------------------------------------------------------------------------------


def test_the_digest_sees_every_parameter_and_buffer() -> None:
    model = classifier()
    reference = weights_digest(model)
    for tensor in model.state_dict().values():
        tensor.view(-1)[-1] += 1
        assert weights_digest(model) != reference
        tensor.view(-1)[-1] -= 1
    assert len(reference) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_digest_does_not_see_layout_or_mode(dtype: torch.dtype) -> None:
    model = classifier().to(dtype)
    reference = weights_digest(model)
    model.train().requires_grad_(False)
    assert weights_digest(model.to(memory_format=torch.channels_last)) == reference  # type: ignore[call-overload]


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"anything": 1}

    def set_extra_state(self, state: Any) -> None: ...


def test_an_extra_state_is_no_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), Extra(4, 2))
    assert "2._extra_state" in model.state_dict()
    assert len(weights_digest(model)) == 64
    assert check(model) == 2


class Keeper(nn.Module):
    """Keeps what it has computed, as training steps do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.kept: list[Any] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images)
        self.last = logits
        self.kept.append({"loss": (logits.sum(), logits)})
        return logits


def test_a_network_that_keeps_results_is_copied() -> None:
    network = Keeper()
    expected = network(torch.ones(2, 2))
    copied = copy_network(network)
    assert isinstance(copied, Keeper)
    assert copied.last.grad_fn is None
    assert copied.last.equal(expected)
    assert copied.kept[0]["loss"][1] is copied.last
    assert copied.layer.weight is not network.layer.weight
    assert copied.layer.weight.equal(network.layer.weight)
    assert network.last.grad_fn is not None


def test_inference_mode_is_told() -> None:
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"outside of torch.inference_mode\(\), .*`inference_mode`"),
    ):
        check(classifier(3))
    with torch.no_grad():  # from which a check gets out by itself
        assert check(classifier(3)) == 3


def test_a_network_that_cannot_be_copied(tmp_path: Path) -> None:
    network = classifier()
    with (tmp_path / "log").open("w") as file:
        network.log = file  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"can be copied, .* failed: cannot pickle '_io"):
            check_copy(network)


def test_a_function_in_place_of_forward_cannot_be_copied() -> None:
    network = classifier()
    original = network.forward
    for whole, found in ((network, "the Sequential"), (nn.Sequential(network), "'0'")):
        network.forward = lambda x: original(x)  # type: ignore[method-assign]
        with pytest.raises(
            ValueError, match=f"a copy of the model can run, but that of {found} was replaced by a"
        ):
            check_copy(whole)
    network.forward = original  # type: ignore[method-assign]
    check_copy(network)
    check_copy(torch.compile(network, backend="eager"))  # type: ignore[arg-type]
