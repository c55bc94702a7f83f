"""A report as one HTML file that a colleague can open: verdict, signals, what was found."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_mnp.report import DefenseReport, Signal, SurrogateTrigger, TriggerExample
from lightning_mnp.report.words import Words
from lightning_mnp.reporting.charts import icon, share_bar, strength_axis, strength_bar
from lightning_mnp.reporting.details import (
    class_table,
    curves,
    file_name,
    moment,
    origin,
    purification,
    settings,
)
from lightning_mnp.reporting.markup import Markup, join, tag
from lightning_mnp.reporting.style import stylesheet

__all__ = ["html"]

# The page asks for nothing, and runs nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_CODE = re.compile(r"`([^`]+)`")
_MOST_CLASSES = 10  # that are compared in one chart
_ASKS = {
    "patch": "How far does a patch on a few pixels take images to one class?",
    "warp": "How much nearer does a warp by half a pixel bring images to one class?",
    "margin": "How sure of one class can the network be made? Counts only with the pile-up.",
    "pile-up": "On which class do predictions fall once the network has unlearned its task? "
    "Counts by itself only on a class that is far too rare on clean images.",
    "permutation": "Can one patch take each class to another one?",
    "reach": "How soon does one perturbation of all images get to one class? Counts only with the "
    "pile-up.",
}
_KINDS = {
    "patch": "patch",
    "overlay": "faint overlay",
    "warp": "warp",
    "permutation": "patch",
}


def html(
    report: DefenseReport,
    *,
    class_names: Sequence[str] | None = None,
    images: Sequence[TriggerExample] | None = None,
) -> str:
    """Return a report as a page that asks for no other file.

    The page has no scripts, is light or dark as the reader's system is, and can be printed. Names
    of classes, layers and files show as text, whatever they hold.

    Args:
        report: The outcome.
        class_names: Names of the classes, in their order; those of the report if None.
        images: Examples of triggered images to show; those of the report if None. With ``()`` the
            page shows no image of the defense set.

    Returns:
        The page.

    Example:
        >>> html(DefenseReport("clean", score=0.25)).startswith("<!DOCTYPE html>")
        True
    """
    words = Words(report, class_names)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{report.verdict}: {file_name(report)}"),
        tag("style", Markup(stylesheet())),
    )
    body = tag(
        "main",
        _verdict(words),
        _signals(words),
        _triggers(words, images),
        curves(report),
        purification(report),
        class_table(words),
        settings(report),
    )
    page = tag("html", head, tag("body", body, origin(report)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _verdict(words: Words) -> Markup:
    report = words.report
    audited = (file_name(report), moment(report))
    lines = [("How sure", words.certainty), ("What to do", words.next_step)]
    facts = [tag("li", fact) for fact in words.facts()]
    notes = [tag("li", tag("strong", "Note: "), note) for note in words.notes()]
    return tag(
        "header",
        tag("span", icon(report.verdict), report.verdict.upper(), class_="badge"),
        tag("h1", words.verdict),
        tag("p", " · ".join(part for part in audited if part), class_="muted small"),
        tag("dl", *[join(tag("dt", name), tag("dd", _with_code(text))) for name, text in lines]),
        tag("ul", *facts, *notes, class_="small") if facts or notes else None,
        class_=f"panel verdict {report.verdict}",
    )


def _with_code(sentence: str) -> Markup:
    """Return a sentence with what stands between backquotes as code."""
    parts = _CODE.split(sentence)
    return join(*[tag("code", part) if index % 2 else part for index, part in enumerate(parts)])


def _signals(words: Words) -> Markup | None:
    signals = words.report.signals
    if not signals:
        return None
    counting = [signal for signal in signals if words.standing(signal) == "counts"]
    others = [signal for signal in signals if signal not in counting]
    parts = [
        tag("h2", "Signals"),
        tag(
            "p",
            "Each signal asks how far one class stands out from the others of the same network. "
            "The line in the middle of a bar is where it counts.",
            class_="muted",
        ),
    ]
    groups = (
        ("Signals that count", counting, words.report.verdict),
        ("Signals that do not count", others, "quiet"),
    )
    for title, group, color in groups:
        if group:
            axis = tag("div", tag("span"), strength_axis(), class_="signal axis")
            rows = [_signal(words, signal, color) for signal in group]
            parts.append(tag("div", tag("h3", title), axis, *rows))
    return tag("section", *parts)


def _signal(words: Words, signal: Signal, color: str) -> Markup:
    value, threshold = words.measured(signal)
    goal = "an exchange of classes"
    if signal.target_class is not None:
        goal = f"class {words.name(signal.target_class)}"
    numbers = f"strength {signal.strength:.2f}"
    measured = f"measured {value}, counts from {threshold}"
    label = f"{signal.name}: {numbers} of the {words.flagged_from:g} needed, points to {goal}"
    return tag(
        "div",
        tag(
            "div",
            tag("div", signal.name, class_="name"),
            tag("div", f"points to {goal}"),
            tag("div", _ASKS.get(signal.name, signal.reason), class_="muted small"),
        ),
        strength_bar(signal.strength, words.flagged_from, color, label),
        tag(
            "div",
            tag("div", numbers),
            tag("div", measured, class_="muted small"),
            None
            if signal.decides
            else tag("div", "does not decide by itself", class_="muted small"),
        ),
        _classes(words, signal),
        class_="signal",
    )


def _classes(words: Words, signal: Signal) -> Markup | None:
    """Return what was measured for each class, most first; it folds away."""
    if not signal.classes:
        return None
    if signal.target_class is None:
        pairs = [
            tag("li", f"{words.name(index)} to {words.name(int(goal))}")
            for index, goal in signal.classes.items()
        ]
        return tag("details", tag("summary", "Where classes go"), tag("ul", *pairs))
    ranked = sorted(signal.classes, key=signal.classes.__getitem__, reverse=True)
    shown = {index: signal.classes[index] for index in ranked[:_MOST_CLASSES]}
    low, high = min(0.0, *shown.values()), max(1e-9, *shown.values())
    rows = [
        tag(
            "tr",
            tag("td", words.name(index)),
            tag(
                "td",
                share_bar(figure, low, high, "first" if index == signal.target_class else "quiet"),
                class_="bar",
            ),
            tag("td", f"{figure:.3g}", class_="number"),
        )
        for index, figure in shown.items()
    ]
    left = len(ranked) - len(shown)
    more = tag("p", f"and {left:,} more classes", class_="muted small") if left else None
    return tag("details", tag("summary", "All classes"), tag("table", *rows), more)


def _triggers(words: Words, images: Sequence[TriggerExample] | None) -> Markup | None:
    report = words.report
    if not report.triggers:
        return None
    parts = [tag("h2", "What was found" if report.verdict != "clean" else "What was tried")]
    meaning = (
        "This is not the attacker's trigger, which nobody knows: it is a stand-in that the audit "
        "has made, and that works in this network. "
    )
    if report.verdict == "clean":
        meaning += "Such a change can be made for any network. Here no class stands out by it."
    parts.append(tag("p", meaning, class_="muted"))
    for number, trigger in enumerate(report.triggers):
        parts.append(_trigger(words, trigger, images if number == 0 or images == () else None))
    return tag("section", *parts)


def _trigger(
    words: Words, trigger: SurrogateTrigger, images: Sequence[TriggerExample] | None
) -> Markup:
    kind = _KINDS.get(trigger.signal, trigger.signal)
    goal = (
        "another class each"
        if trigger.target_class is None
        else (f"class {words.name(trigger.target_class)}")
    )
    examples = trigger.examples if images is None else images
    pictures = [_example(words, kind, example) for example in examples]
    pattern = _picture(trigger.pattern, f"What the {kind} changes in an image, on gray")
    if pattern is not None:
        caption = tag("figcaption", f"what the {kind} changes", class_="muted small")
        pictures.insert(0, tag("figure", pattern, caption, class_="alone"))
    return join(
        tag("h3", f"A {kind} that takes images to {goal}"),
        tag("p", f"It does so with {trigger.success:.0%} of {trigger.images:,} clean images."),
        tag("div", *pictures, class_="pictures") if pictures else None,
    )


def _example(words: Words, kind: str, example: TriggerExample) -> Markup:
    true, before, after = (
        words.name(index) for index in (example.label, example.before, example.after)
    )
    seen = "recognized" if example.label == example.before else f"taken for {before}"
    clean = _picture(example.clean, f"A clean image of class {true}, {seen}")
    changed = _picture(example.triggered, f"The same image with the {kind}, taken for {after}")
    caption = tag(
        "figcaption",
        f"{true}, {seen}; with the {kind} taken for ",
        tag("strong", after),
        class_="small",
    )
    return tag("figure", clean, changed, caption)


def _picture(data: str, alt: str) -> Markup | None:
    """Return a picture; nothing if what a file holds is none."""
    if not _BASE64.fullmatch(data):
        return None
    return tag("img", src=Markup(f"data:image/png;base64,{data}"), alt=alt)
