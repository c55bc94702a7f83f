from __future__ import annotations

import argparse

import pytest

from lightning_mnp.cli.hints import find_hint, named_command, plain_message

MODULE = "<class 'lightning.pytorch.core.module.LightningModule'>"


def no_class(error: str, value: str) -> str:
    """What jsonargparse says of a class that it does not take."""
    return (
        'Parser key "model":\n  Does not validate against any of the Union subtypes\n'
        f"  Subtypes: [{MODULE}, <class 'NoneType'>]\n  Errors:\n    - {error}\n"
        f"    - Expected a <class 'NoneType'>\n  Given value type: <class 'str'>\n"
        f"  Given value: {value}"
    )


def problem(path: str, why: str) -> str:
    return no_class(f"Problem with given class_path '{path}':\n        {why}", path)


CLASSIFIER = "lightning_mnp.models.Classifier"


@pytest.mark.parametrize(
    ("message", "plain", "hint"),
    [
        (
            problem("lightning_mnp.models.Clasifier", "module 'm' has no attribute 'Clasifier'"),
            "Expected argument `--model` to be a class path, but got "
            "lightning_mnp.models.Clasifier: module 'm' has no attribute 'Clasifier'.",
            f"Did you mean {CLASSIFIER}?",
        ),
        (
            problem("argparsee.Action", "No module named 'argparsee'"),
            "Expected argument `--model` to be a class path, but got argparsee.Action: "
            "No module named 'argparsee'.",
            "Did you mean argparse.Action?",
        ),
        (
            problem("lightning_mnp.cli.wordz.WordsParser", "No module named 'x'"),
            "Expected argument `--model` to be a class path, but got "
            "lightning_mnp.cli.wordz.WordsParser: No module named 'x'.",
            "",
        ),
        (
            problem("xml.etre.ElementTree", "No module named 'xml.etre'"),
            "Expected argument `--model` to be a class path, but got xml.etre.ElementTree: "
            "No module named 'xml.etre'.",
            "Did you mean xml.etree.ElementTree?",
        ),
        (
            problem("zzz.Net", "No module named 'zzz'"),
            "Expected argument `--model` to be a class path, but got zzz.Net: "
            "No module named 'zzz'.",
            "",
        ),
        (
            no_class("Import path does not correspond to a subclass", "argparse.Action"),
            "Expected argument `--model` to be the class path of a LightningModule, but got "
            "argparse.Action.",
            "",
        ),
        (
            problem(CLASSIFIER, "Option 'widthh' is not accepted"),
            f"Expected `--model.widthh` to be an argument of {CLASSIFIER}, which has no `widthh`.",
            "Did you mean width?",
        ),
        (
            problem(CLASSIFIER, 'Parser key "width": Expected\n          a number.'),
            f"Expected options that {CLASSIFIER} takes for `--model`, but: "
            'Parser key "width": Expected a number.',
            "",
        ),
        (
            "Parser key \"mnp.rule\":\n  Expected a typing.Literal['signals', 'ratio']. "
            "Got value: ration",
            "Expected argument `--mnp.rule` to be one of 'signals', 'ratio', but got ration.",
            "Did you mean ratio?",
        ),
        (
            "Parser key \"mnp.runs\": Expected a <class 'int'>. Got value: many",
            "Expected argument `--mnp.runs` to be a whole number, but got many.",
            "",
        ),
        (
            "the following arguments are required: audit.ckpt_path",
            "Expected argument `--ckpt_path`, which is required, but got none.",
            "",
        ),
        (
            "the following arguments are required: audit.ckpt_path, audit.data, audit.model",
            "Expected arguments `--ckpt_path`, `--data` and `--model`, but got none of them.",
            "A configuration names model and data, for example `--config package:audit-cifar10`.",
        ),
        (
            "the following arguments are required: fit.model",
            "Expected argument `--model`, which is required, but got none.",
            "A configuration names model and data, for example "
            "`--config package:fit-cifar10-2core`.",
        ),
        (
            "the following arguments are required: run.base, run.grids",
            "Expected arguments `--base` and `--grids`, but got none of them.",
            "",
        ),
        (
            "Subcommand 'audit' does not accept option 'mnp.rul'",
            "Subcommand 'audit' does not accept option 'mnp.rul'",
            "Did you mean --mnp.rule?",
        ),
        (
            "Parser key \"config\": File does not exist: 'a.yaml'",
            "Argument `--config`: File does not exist: 'a.yaml'",
            "",
        ),
        ("something else", "something else", ""),
    ],
)
def test_errors_in_plain_words_and_what_was_meant(message: str, plain: str, hint: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mnp.rule")
    assert plain_message(message) == plain
    assert find_hint(message, parser) == hint


def test_a_class_path_that_is_right_is_not_corrected() -> None:
    message = no_class("Import path does not correspond to a subclass", CLASSIFIER)
    assert find_hint(message, argparse.ArgumentParser()) == ""


def test_only_a_missing_argument_names_its_command() -> None:
    assert named_command("the following arguments are required: defend.output") == "defend"
    assert named_command("unrecognized arguments: --a.b") == ""
