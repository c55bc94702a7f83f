from __future__ import annotations

from dataclasses import replace

from cell_results import result

from lightning_mnp.benchmark.notes import (
    fine_tuned,
    losses,
    not_counted,
    not_learned,
    not_shown,
    other_code,
    other_recipes,
    trained_again,
)


def test_it_is_said_in_words_where_ours_loses() -> None:
    results = [
        result("mnp", (0.90, 0.05)),
        result("default", (0.92, 0.01)),
        result("anp", (0.91, 0.05)),  # a better CA, the same ASR
        result("clp", (0.90, 0.048)),  # by less than half a point
        result("rnp", (0.95, 0.06)),  # better in one, worse in the other
    ]
    assert losses("BadNets", results) == [
        "BadNets: MNP (90.00 / 5.00) loses to default (92.00 / 1.00) and ANP (91.00 / 5.00)."
    ]


def test_nothing_is_said_where_ours_does_not_lose() -> None:
    assert losses("BadNets", [result("default", (0.92, 0.01)), result("anp", (0.91, 0.01))]) == []
    assert losses("BadNets", [result("anp", (0.91, 0.01))]) == []


def test_networks_count_once_in_what_was_not_learned() -> None:
    results = [result("anp", before=(0.9, 0.4)), result("clp", before=(0.9, 0.4)), result(seed=1)]
    [told] = not_learned("BadNets", results)
    assert told.startswith("BadNets: 1 of 2 networks have an ASR below 50%")
    assert not_learned("BadNets", results[2:]) == []


def test_recipes_that_were_trained_more_than_once_are_named() -> None:
    results = [result("anp", weights="a"), result("clp", weights="a"), result("clp", seed=1)]
    assert trained_again(results) == []
    [told] = trained_again([*results, result("default", weights="b")])
    assert "rows are of different networks: BadNets (2)." in told


def test_networks_that_were_trained_whole_are_not_named() -> None:
    assert fine_tuned([result()]) == []
    tuned = result(fine_tuning={"trainer.max_epochs": 3}, epochs=3)
    [told] = fine_tuned([tuned, result("clp")])
    assert told.endswith("BadNets (3 epochs; 1 whole).")


def test_several_versions_of_a_methods_code_are_told() -> None:
    results = [result("anp"), result("anp", attack="SIG"), result("clp")]
    assert other_code(results) == []
    newer = result("anp", seed=1)
    results.append(replace(newer, content={**newer.content, "code": "xyz-ghi"}))
    retrained = result("clp", seed=1)  # another version of the training alone
    results.append(replace(retrained, content={**retrained.content, "code": "xyz-def"}))
    assert other_code(results) == ["By several versions of the method's code: ANP (2)."]


def test_what_is_not_shown_is_counted() -> None:
    assert not_shown([]) == []
    assert not_shown(["mnp (suppression.mu=0.1)"]) == [
        "Not in this table: 1 method with other options was run on one attack only."
    ]
    assert "2 methods with other options were run" in not_shown(["a", "b"])[0]


def test_networks_of_several_recipes_under_one_name_are_told() -> None:
    seeds = [result("anp"), result("clp"), result("anp", seed=1), result("anp", rate=0.2)]
    assert other_recipes(seeds) == []
    longer = result("anp", epochs=40)  # and another digest
    [told] = other_recipes([*seeds, longer])
    assert "Networks of several recipes" in told
    assert ": BadNets, seed 0 (2). Means here mix them" in told


def test_passes_that_do_not_count_are_told() -> None:
    assert not_counted([result("anp"), result("ft")]) == []
    [told] = not_counted([result("anp"), result("i-bau (lr=0.0001)")])
    assert told.startswith("Passes leave out I-BAU's products")
