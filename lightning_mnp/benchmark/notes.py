"""Sentences below the tables: what was not learned, how networks were trained, where ours loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_mnp.benchmark.pairs import Pair, mean_pair, pairs_of, shown
from lightning_mnp.benchmark.results import Result
from lightning_mnp.benchmark.table import head

__all__ = [
    "POINTS",
    "fine_tuned",
    "losses",
    "not_counted",
    "not_learned",
    "not_shown",
    "other_code",
    "other_recipes",
    "trained_again",
]

# A rival is better if it is so by more than this, in CA or ASR, and no worse in the other.
POINTS = 0.5
_LEARNED = 50.0  # ASR in percent


def not_counted(results: Sequence[Result]) -> list[str]:
    """Return a sentence that says what passes leave out, if a method does more than they tell.

    Args:
        results: The results.
    """
    if all(each.label.partition(" (")[0] != "i-bau" for each in results):
        return []
    return [
        "Passes leave out I-BAU's products with second derivatives, six for each batch that the "
        "weights learn from: they take most of its time."
    ]


def not_learned(attack: str, group: Sequence[Result]) -> list[str]:
    """Return a sentence that says that networks have not learned an attack, if it is so.

    Args:
        attack: Its name.
        group: The results on it.
    """
    rates = [rate for _, rate in pairs_of(group, "before")]
    weak = [rate for rate in rates if rate is not None and rate < _LEARNED]
    if not weak:
        return []
    found = f"{len(weak)} of {len(rates)} networks have an ASR below {_LEARNED:.0f}% before any"
    return [f"{attack}: {found} defense, so the attack was not learned."]


def fine_tuned(results: Sequence[Result]) -> list[str]:
    """Return a sentence that says which networks were not trained whole, if there are any.

    Args:
        results: The results.
    """
    told = []
    for attack in dict.fromkeys(each.attack for each in results):
        group = [each for each in results if each.attack == attack]
        # Files of before `fine_tuning` have none.
        tuned = [each for each in group if each.network.get("fine_tuning")]
        whole = len({r.network["digest"] for r in group} - {r.network["digest"] for r in tuned})
        epochs = sorted({each.network["epochs"] for each in tuned})
        if tuned:
            count = " and ".join(map(str, epochs))
            rest = f"; {whole} whole" if whole else ""
            told.append(f"{attack} ({count} epochs{rest})")
    return [f"Trained on from the clean network of their seed: {', '.join(told)}."] if told else []


def of_seed(here: Sequence[Result], all_results: Sequence[Result]) -> str:
    """Return what a title says of the seed of networks; nothing if the setting has no other.

    Args:
        here: The results of a table.
        all_results: Those of all tables.
    """
    seeds = {each.network["seed"] for each in here}
    others = {r.network["seed"] for r in all_results if r.setting == here[0].setting}
    told = ", ".join(str(seed) for seed in sorted(seeds))
    return "" if seeds == others else f", networks of seed {told}"


def trained_again(results: Sequence[Result]) -> list[str]:
    """Return a sentence that says which recipes gave several networks, if any did.

    Args:
        results: The results.
    """
    weights: dict[tuple[str, str], set[str]] = {}
    for each in results:
        if each.is_done:
            place = each.attack, str(each.network["digest"])
            weights.setdefault(place, set()).add(each.network_key)
    told = [f"{attack} ({len(keys)})" for (attack, _), keys in weights.items() if len(keys) > 1]
    if not told:
        return []
    return [
        f"Trained more than once by the same recipe, so that rows are of different networks: "
        f"{', '.join(sorted(told))}. *No defense* is their mean; CA drops are against the network "
        "that the defense had."
    ]


def other_recipes(results: Sequence[Result]) -> list[str]:
    """Return a sentence that says which networks of one name are of several recipes, if any are.

    Seed, rate and mode are in what a table shows, and options in its setting. Epochs and options of
    attacks in the configurations are not.

    Args:
        results: The results of one setting.
    """
    recipes: dict[tuple[Any, ...], set[str]] = {}
    for each in results:
        network = each.network
        place = each.attack, *(network[name] for name in ("attack", "seed", "rate", "mode"))
        recipes.setdefault(place, set()).add(str(network["digest"]))
    told = [
        f"{place[0]}, seed {place[2]} ({len(digests)})"
        for place, digests in recipes.items()
        if len(digests) > 1
    ]
    if not told:
        return []
    return [
        "Networks of several recipes, which differ in epochs or in options of the attack and not "
        f"by chance: {'; '.join(sorted(told))}. Means here mix them: make a report of the cells of "
        "each recipe alone."
    ]


def other_code(results: Sequence[Result]) -> list[str]:
    """Return a sentence that says which methods were run by several versions of their code, if any.

    Args:
        results: The results.
    """
    versions: dict[str, set[str]] = {}
    for each in results:
        if each.is_done:
            # Before the dash is the version of the training.
            method = str(each.content["code"]).rpartition("-")[2]
            versions.setdefault(each.label, set()).add(method)
    told = [f"{head(label)} ({len(each)})" for label, each in versions.items() if len(each) > 1]
    return [f"By several versions of the method's code: {', '.join(told)}."] if told else []


def not_shown(trials: Sequence[str]) -> list[str]:
    """Return a sentence that says how many trials of options have a table of their own, if any.

    Args:
        trials: Labels of the methods.
    """
    if not trials:
        return []
    what = (
        "method with other options was" if len(trials) == 1 else "methods with other options were"
    )
    return [f"Not in this table: {len(trials)} {what} run on one attack only."]


def losses(attack: str, group: Sequence[Result]) -> list[str]:
    """Return sentences that say where this package's settings lose.

    Args:
        attack: Its name.
        group: The results on it.
    """
    pairs: dict[str, Pair] = {}
    for label in dict.fromkeys(each.label for each in group):
        done = [r.percent("after") for r in group if r.label == label and r.is_done]
        if done:
            pairs[label] = mean_pair(done)
    notes = []
    for own in ("mnp", "default"):
        if own not in pairs or pairs[own][1] is None:
            continue
        better = [
            f"{head(label)} ({shown(pair)})"
            for label, pair in pairs.items()
            if label != own and _is_better(pair, pairs[own])
        ]
        if better:
            rivals = " and ".join(better)
            notes.append(f"{attack}: {head(own)} ({shown(pairs[own])}) loses to {rivals}.")
    return notes


def _is_better(rival: Pair, own: Pair) -> bool:
    if rival[1] is None or own[1] is None:
        return False
    gain_ca, gain_asr = rival[0] - own[0], own[1] - rival[1]
    return min(gain_ca, gain_asr) >= 0 and max(gain_ca, gain_asr) > POINTS
