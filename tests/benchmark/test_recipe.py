from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmark_site import ATTACKS, BASE, make_site

from lightning_mnp.benchmark.recipe import NetworkRecipe


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site")


def test_overlays_are_laid_over_the_base(base: Path) -> None:
    content = NetworkRecipe(base, "badnets", seed=3).content
    attack = content["data"]["init_args"]["attack"]
    assert attack["class_path"] == "lightning_mnp.attacks.BadNets"
    assert attack["init_args"] == {"patch_size": 2, "poison_rate": 0.25, "seed": 3}
    assert content["seed_everything"] == content["data"]["init_args"]["seed"] == 3
    assert content["model"]["init_args"]["width"] == 2
    assert content["trainer"]["accelerator"] == "cpu"
    [callback] = content["trainer"]["callbacks"]
    assert callback["init_args"]["filename"] == "last"


def test_an_overlay_may_change_the_class_and_keeps_the_arguments(base: Path) -> None:
    model = NetworkRecipe(base, "wanet").content["model"]
    assert model["class_path"] == "lightning_mnp.attacks.WaNetModule"
    assert model["init_args"]["width"] == 2


def test_several_overlays(base: Path) -> None:
    recipe = NetworkRecipe(base, "badnets+badnets-all-to-all")
    assert recipe.described()["mode"] == "all-to-all"
    assert not recipe.described()["usual"]


def test_axes_replace_what_is_configured(base: Path) -> None:
    recipe = NetworkRecipe(
        base, "badnets", 1, "cifar_resnet34", 6, 0.5, "all-to-all", options={"model.lr": 0.2}
    )
    told = recipe.described()
    assert (told["architecture"], told["width"]) == ("cifar_resnet34", 6)
    assert (told["rate"], told["mode"], told["usual"]) == (0.5, "all-to-all", False)
    assert recipe.content["model"]["init_args"]["lr"] == 0.2


def test_described(base: Path) -> None:
    told = NetworkRecipe(base, "badnets").described()
    assert (told["attack"], told["attack_class"], told["data"]) == (
        "badnets",
        "BadNets",
        "SiteData",
    )
    assert (told["mode"], told["rate"], told["usual"], told["base"]) == (
        "all-to-one",
        0.25,
        True,
        "base",
    )
    clean = NetworkRecipe(base).described()
    assert (clean["attack_class"], clean["mode"], clean["rate"]) == ("clean", None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"attack": "badnets"},
        {"seed": 1},
        {"width": 3},
        {"architecture": "cifar_resnet34"},
        {"device": "cuda"},
        {"options": {"trainer.max_epochs": 2}},
    ],
)
def test_what_decides_on_the_weights_changes_the_digest(
    base: Path, changes: dict[str, Any]
) -> None:
    assert NetworkRecipe(base, **changes).digest != NetworkRecipe(base).digest


def test_the_content_of_an_image_that_an_attack_names_changes_the_digest(base: Path) -> None:
    image = base.with_name("image.png")
    (base.with_name("picture.yaml")).write_text(
        "data: {init_args: {attack: {class_path: lightning_mnp.attacks.Blend, init_args: "
        f"{{image: {image}}}}}}}}}"
    )
    missing = NetworkRecipe(base, attack="picture").digest
    image.write_bytes(b"one")
    first = NetworkRecipe(base, attack="picture").digest
    image.write_bytes(b"two")
    assert len({missing, first, NetworkRecipe(base, attack="picture").digest}) == 3


def test_what_does_not_decide_on_the_weights_leaves_the_digest(base: Path, tmp_path: Path) -> None:
    other = make_site(tmp_path / "elsewhere")
    other.write_text(f"# A comment\n{BASE}".replace("lr: 0.05", "lr:   0.05"))
    assert NetworkRecipe(other).digest == NetworkRecipe(base).digest
    quiet = NetworkRecipe(base, options={"trainer.logger": False})
    assert quiet.digest == NetworkRecipe(base).digest


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("lightning_mnp.data.CIFAR10DataModule", False),
        ("lightning_mnp.data.ImageNetSubsetDataModule", False),
        ("lightning_mnp.data.ImageFolderDataModule", True),
        ("benchmark_site.SiteData", True),  # nobody knows what is in it
    ],
)
def test_the_folder_of_the_images_counts_where_it_is_the_data_set(
    kind: str, counts: bool, base: Path
) -> None:
    def of(root: str, data: str | None = None) -> NetworkRecipe:
        base.write_text(f"{BASE}    root: {root}\n".replace("benchmark_site.SiteData", kind))
        recipe = NetworkRecipe(base, data=None if data is None else Path(data))
        assert recipe.described().get("root") == ((data or root) if counts else None)
        return recipe

    assert (of("/cats").digest != of("/dogs").digest) is counts
    assert (of("/cats").digest != of("/cats", "/dogs").digest) is counts
    assert of("/cats", "/dogs").digest == of("/dogs").digest


@pytest.mark.parametrize("rate", ["5e-2", "0.05", ".5e-1", "5.0E-2", "+50e-3"])
def test_a_rate_is_the_number_that_fit_reads(base: Path, rate: str) -> None:
    text = ATTACKS["badnets"]
    for name, value in (("usual", "0.05"), ("own", rate)):
        path = base.parent / f"{name}.yaml"
        path.write_text(text.replace("poison_rate: 0.25", f"poison_rate: {value}"))
    recipe = NetworkRecipe(base, "own")
    assert recipe.described()["rate"] == 0.05
    assert recipe.digest == NetworkRecipe(base, "usual").digest


def test_classes_may_be_named_alone(base: Path) -> None:
    alone = "model: lightning_mnp.models.Classifier\ndata: benchmark_site.SiteData\n"
    base.write_text(alone)
    (base.parent / "own.yaml").write_text(
        "data:\n  init_args:\n    attack: lightning_mnp.attacks.BadNets\n"
    )
    recipe = NetworkRecipe(base, "own", seed=2)
    assert recipe.attack_name == "BadNets"
    assert recipe.content["model"]["class_path"] == "lightning_mnp.models.Classifier"
    assert recipe.content["data"]["init_args"]["attack"]["init_args"] == {"seed": 2}


def test_a_recipe_that_needs_a_clean_network(base: Path) -> None:
    recipe = NetworkRecipe(base, "cl", width=4)
    assert recipe.clean == NetworkRecipe(base, width=4)
    reference = recipe.attack_options["init_args"]["reference"]["init_args"]
    assert (reference["width"], reference["num_classes"]) == (4, 4)
    content = recipe.configuration(Path("out"), Path("images"), Path("some/last.ckpt"))
    placed = content["data"]["init_args"]["attack"]["init_args"]["reference"]["init_args"]
    assert placed["checkpoint"] == "some/last.ckpt"
    assert content["data"]["init_args"]["root"] == "images"
    assert content["trainer"]["default_root_dir"] == "out"
    # The place of the clean network is no part of the digest, its own recipe is.
    (base.parent / "cl.yaml").write_text(
        (base.parent / "cl.yaml").read_text().replace("clean.ckpt", "other.ckpt")
    )
    assert NetworkRecipe(base, "cl", width=4).digest == recipe.digest
    assert NetworkRecipe(base, "badnets").clean is None


def test_fine_tuning_starts_from_the_clean_network(base: Path) -> None:
    tuning = {"trainer.max_epochs": 3, "model.lr": 0.01}
    options = {"trainer.max_epochs": 9}
    recipe = NetworkRecipe(base, "badnets", 2, options=options, fine_tuning=tuning)
    assert recipe.clean == NetworkRecipe(base, seed=2, options=options)
    assert recipe.clean.content["trainer"]["max_epochs"] == 9
    content = recipe.configuration(Path("out"), None, Path("clean/last.ckpt"))
    assert content["trainer"]["max_epochs"] == 3
    arguments = content["model"]["init_args"]
    assert (arguments["lr"], arguments["checkpoint"]) == (0.01, "clean/last.ckpt")
    told = recipe.described()
    assert (told["epochs"], told["fine_tuning"], told["usual"]) == (3, tuning, True)
    whole = NetworkRecipe(base, "badnets", 2, options=options)
    assert whole.described()["fine_tuning"] == {}
    assert len({recipe.digest, whole.digest, recipe.clean.digest}) == 3


def test_fine_tuning_leaves_a_clean_network_as_it_is(base: Path) -> None:
    recipe = NetworkRecipe(base, fine_tuning={"trainer.max_epochs": 3})
    assert recipe.digest == NetworkRecipe(base).digest
    assert recipe.clean is None
    assert recipe.described()["fine_tuning"] == {}


def test_the_configuration_of_an_attack_has_the_last_word(base: Path) -> None:
    (base.parent / "badnets.yaml").write_text(ATTACKS["badnets"] + "trainer: {max_epochs: 7}\n")
    recipe = NetworkRecipe(base, "badnets", fine_tuning={"trainer.max_epochs": 3})
    assert recipe.described()["epochs"] == 7


def test_fine_tuning_of_an_attack_that_is_made_with_the_clean_network(base: Path) -> None:
    recipe = NetworkRecipe(base, "cl", fine_tuning={"model.lr": 0.01})
    content = recipe.configuration(Path("out"), None, Path("clean/last.ckpt"))
    reference = content["data"]["init_args"]["attack"]["init_args"]["reference"]["init_args"]
    assert reference["checkpoint"] == content["model"]["init_args"]["checkpoint"]
    assert recipe.clean == NetworkRecipe(base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attack": "badnets", "fine_tuning": {"model.width": 3}},
            "`fine_tuning` to leave the shape of the clean network",
        ),
        ({"fine_tuning": {"trainer.max_epoch": 3}}, "`fine_tuning` that Trainer takes, but got"),
        (
            {"attack": "badnet"},
            r"out of clean, badnets, cl, wanet, but got 'badnet'. Did you mean 'b",
        ),
        ({"attack": "badnets-all-to-all"}, "Expected an attack out of"),
        ({"attack": "clean+badnets"}, r"got 'clean' in 'clean\+badnets', which has none\. Leave"),
        ({"attack": "badnets+clean"}, "Expected attacks that are joined by `\\+`"),
        ({"attack": "../site/badnets"}, "Expected an attack out of"),
        (
            {"attack": "cl", "poison_rate": 0.1},
            r"'cl' to take the option `poison_rate`.*class_rate",
        ),
        ({"attack": "cl", "mode": "all-to-all"}, "takes one mode only. Give it a grid of its own"),
        ({"options": {"model.widths": 3}}, "`options` that Classifier takes, but got"),
    ],
)
def test_mistakes(base: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = NetworkRecipe(base, **changes).content


def test_a_rate_that_is_not_configured_is_that_of_the_attack(base: Path) -> None:
    for name, rate in (("BadNets", 0.1), ("SIG", 0.8), ("FeatureCollision", None)):
        text = ATTACKS["badnets"].partition("      init_args:\n        patch")[0]
        (base.parent / "own.yaml").write_text(text.replace("BadNets", name))
        assert NetworkRecipe(base, "own").described()["rate"] == rate


EARLY = "lightning.pytorch.callbacks.EarlyStopping"
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        ("null", [CHECKPOINT]),
        (f"{{class_path: {EARLY}}}", [EARLY, CHECKPOINT]),
        (f"{{class_path: {CHECKPOINT}, init_args: {{filename: last}}}}", [CHECKPOINT]),
        (f"{{class_path: {CHECKPOINT}, init_args: {{save_last: true}}}}", [CHECKPOINT]),
        (f"[{{class_path: {EARLY}}}]", [EARLY, CHECKPOINT]),
        ("[EarlyStopping]", ["EarlyStopping", CHECKPOINT]),
    ],
)
def test_callbacks_as_lightning_takes_them(base: Path, callbacks: str, expected: list[str]) -> None:
    base.write_text(BASE.replace("trainer:", f"trainer:\n  callbacks: {callbacks}"))
    recipe = NetworkRecipe(base)
    found = recipe.content["trainer"]["callbacks"]
    assert [each if isinstance(each, str) else each["class_path"] for each in found] == expected
    assert len(recipe.digest) == 12


@pytest.mark.parametrize(
    "rule",
    [
        "ModelCheckpoint",
        f"{{class_path: {CHECKPOINT}}}",
        f"{{class_path: {CHECKPOINT}, init_args: {{filename: last, dirpath: runs}}}}",
        f"[{{class_path: {CHECKPOINT}, init_args: {{save_last: false}}}}]",
    ],
)
def test_a_checkpoint_that_would_be_looked_for_in_vain(base: Path, rule: str) -> None:
    base.write_text(BASE.replace("trainer:", f"trainer:\n  callbacks: {rule}"))
    with pytest.raises(ValueError, match=r"to write `checkpoints/last\.ckpt`, .* Leave it out"):
        _ = NetworkRecipe(base).content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "to hold options of `fit`"),
        ("{}", r"base .*base\.yaml to name a class as `model\.class_path`, but got None"),
        (BASE.partition("data:")[0], r"to name a class as `data\.class_path`, but got None"),
        (BASE.replace("class_path: benchmark", "class: benchmark"), r"`data\.class_path`, but got"),
        (BASE.replace("trainer:", "trainer: 3\nother:"), "`trainer` in .* hold options, .* got 3"),
        ("model:\n", "`model` in .* to hold options, a line for each, but got None"),
        ("data: {init_args: 3}", r"`data\.init_args` in .* to hold options, .* but got 3"),
        (BASE.replace("width: 2", "network: {class_path: a.B}"), "by `architecture`, but got `net"),
    ],
)
def test_mistakes_of_a_base(base: Path, text: str, message: str) -> None:
    base.write_text(text)
    with pytest.raises(ValueError, match=message):
        _ = NetworkRecipe(base).content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"trainer: 3\n{ATTACKS['badnets']}", r"`trainer` in .*own\.yaml to hold options"),
        ("data: {init_args: {attack: 3}}", "Expected an attack out of"),
    ],
)
def test_mistakes_of_an_attack(base: Path, text: str, message: str) -> None:
    (base.parent / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        _ = NetworkRecipe(base, "own").content


@pytest.mark.parametrize(
    "other",
    [
        "data: /path",
        "data: null",
        "data:\n  class_path: a.B\n  init_args:",
        "model: {init_args: 3}",
        "- a list",
        "a: [",
        "a: \xff",
    ],
)
def test_a_misspelled_attack_beside_other_files(base: Path, other: str) -> None:
    (base.parent / "other.yaml").write_bytes(other.encode("latin-1"))
    with pytest.raises(ValueError, match=r"out of clean, badnets, cl, .*Did you mean 'badnets'\?"):
        _ = NetworkRecipe(base, "badnet").content


def test_arguments_that_are_left_empty(base: Path) -> None:
    base.write_text(BASE.partition("    batch_size")[0])
    (base.parent / "own.yaml").write_text(
        "data:\n  init_args:\n    attack:\n      class_path: lightning_mnp.attacks.BadNets\n"
        "      init_args:"
    )
    content = NetworkRecipe(base, "own", seed=2).content
    assert content["data"]["init_args"]["attack"]["init_args"] == {"seed": 2}
