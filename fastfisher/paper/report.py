"""Writes what an experiment found: ``ID.md``, ``ID.csv``, ``ID.png`` and ``ID.svg``, each whole or not at all."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastfisher.paper.cases import Key, Tuned
from fastfisher.paper.claims import CLAIMS, HOW_TESTED, Check, together
from fastfisher.paper.experiment import Experiment, Outcome, Quantity
from fastfisher.training.config import TrainConfig, flag
from fastfisher.training.folder import replacing
from fastfisher.training.summary import Summary

SCALES = {
    "paper": "Scale: **paper**, the networks, data and schedules of the paper.",
    "digits": "Scale: **digits**, real but small: scikit-learn's digits, reduced networks of the same kinds, shortened "
    "schedules. Not the paper's setting: titles and rows keep the paper's names, but all data are digits; the paper's "
    "numbers are beside ours to be looked at, not to be reached.",
}
DRY = "**A dry run**: two steps of four examples for each kind of run, to see that everything works. Nothing is found."


def write_report(
    name: str, experiment: Experiment, outcome: Outcome, tuned: Mapping[Tuned, float], out: Path, *, dry_run: bool
) -> list[Check]:
    """Write the report of an experiment to a folder, and return its checks."""
    out.mkdir(parents=True, exist_ok=True)
    checks = list(experiment.checks(outcome))
    figure = Figure(figsize=experiment.size, layout="constrained")
    FigureCanvasAgg(figure)
    experiment.draw(figure, outcome)
    # Without a date and with fixed ids the same runs give the same file.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with replacing(out / f"{name}.{ending}") as file:
                figure.savefig(file, format=ending, dpi=120, metadata=metadata)
    text = {"csv": _csv(experiment, outcome), "md": _markdown(name, experiment, outcome, checks, tuned, dry_run)}
    for ending, content in text.items():
        with replacing(out / f"{name}.{ending}") as file:
            file.write(content.encode())
    return checks


def _csv(experiment: Experiment, outcome: Outcome) -> str:
    """A line for each case and quantity: the paper's number, ours, and what each seed gave."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("case", "quantity", "paper", "mean", "standard_deviation", "seeds", "diverged", "by_seed"))
    for key in outcome.runs:
        for quantity in experiment.quantities:
            values = outcome.values(key, quantity)
            found = outcome.summary(key, quantity)
            writer.writerow(
                (
                    " | ".join(key),
                    quantity.name,
                    experiment.paper.get((key, quantity.name), ""),
                    "" if found is None else repr(found.mean),
                    "" if found is None or found.std is None else repr(found.std),
                    len(values),
                    len(outcome.diverged.get(key, ())),
                    " ".join(f"{seed}:{value!r}" for seed, value in values.items()),
                )
            )
    return text.getvalue()


def _markdown(
    name: str,
    experiment: Experiment,
    outcome: Outcome,
    checks: Sequence[Check],
    tuned: Mapping[Tuned, float],
    dry_run: bool,
) -> str:
    seeds = len(outcome.seeds)
    lines = [
        f"# {name}: {experiment.title}",
        "",
        SCALES[outcome.scale],
        *(["", DRY] if dry_run else []),
        f"Mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}.",
        "",
        *_verdicts(checks),
        f"![{experiment.title}]({name}.png)",
        "",
        *_tables(experiment, outcome),
        "## Settings",
        "",
        *(f"- {note}" for note in experiment.notes(outcome.scale)),
        *_tuning(tuned),
        *_divergence(outcome),
        "",
        *_options(outcome.configs),
        f"Every number, and what each seed gave: [{name}.csv]({name}.csv).",
    ]
    return "\n".join(lines) + "\n"


def _verdicts(checks: Sequence[Check]) -> list[str]:
    if not checks:
        return ["It bears on none of the twelve claims.", ""]
    lines = []
    for claim in dict.fromkeys(check.claim for check in checks):
        if claim is not None:
            verdict = together(check.verdict for check in checks if check.claim == claim)
            lines.append(f"- Claim {claim}: {CLAIMS[claim]} **{verdict.capitalize()}** here.")
    lines += [
        *([""] if lines else []),
        *_table(
            ("statement", "number", "claimed", "mean [95 % interval]", "verdict"),
            ((c.statement, c.number, c.claimed, str(c), f"**{c.verdict}**") for c in checks),
        ),
        HOW_TESTED,
        "",
    ]
    return lines


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _tables(experiment: Experiment, outcome: Outcome) -> list[str]:
    """Return a table for each quantity where cases are rows and columns of one, else one table of all quantities."""
    quantities = experiment.quantities
    if not all(len(key) == 2 for key in outcome.runs):
        header = ["", *(quantity.name for quantity in quantities)]
        return _table(
            header,
            ([", ".join(key), *(_cell(experiment, outcome, key, each) for each in quantities)] for key in outcome.runs),
        )
    columns = list(dict.fromkeys(key[1] for key in outcome.runs))
    lines = []
    for quantity in quantities:
        rows = (
            [row, *(_cell(experiment, outcome, (row, column), quantity) for column in columns)]
            for row in outcome.rows()
        )
        lines += _table([quantity.name, *columns], rows)
    return lines


def _cell(experiment: Experiment, outcome: Outcome, key: Key, quantity: Quantity) -> str:
    if key not in outcome.runs:
        return ""
    found = outcome.summary(key, quantity)
    text = "–" if found is None else _number(found)
    paper = experiment.paper.get((key, quantity.name))
    return text if paper is None else f"{text} (paper {paper:g})"


def _number(found: Summary) -> str:
    """Return mean ± std, with four digits where two decimals would show too few."""
    if abs(found.mean) >= 1:
        return str(found)
    return f"{found.mean:.3g}" if found.std is None else f"{found.mean:.3g} ± {found.std:.2g}"


def _tuning(tuned: Mapping[Tuned, float]) -> list[str]:
    lines = []
    for each, value in tuned.items():
        options = dict(each.case.options)
        what = f"`{each.option}` of {options.get('network', 'the network')}, {options.get('method', 'baseline')}"
        if each.option != "lr" and not isinstance(options.get("lr"), Tuned) and "lr" in options:
            what += f" at learning rate {options['lr']:g}"
        if options.get("label_noise"):
            what += f", {options['label_noise']:.0%} noise"
        times = "" if each.factor == 1.0 else f", {each.factor:.3g} times the best"
        grid = ", ".join(f"{v:.4g}" for v in each.values)
        lines.append(f"- Tuned on validation ({each.judged} epoch): {what}: **{value:g}**{times} of {grid}.")
    return sorted(set(lines))


def _divergence(outcome: Outcome) -> list[str]:
    return [
        f"- Diverged, and in no number: {', '.join(key)}, of seeds {', '.join(map(str, seeds))}."
        for key, seeds in outcome.diverged.items()
        if seeds
    ]


def _options(configs: Mapping[Key, TrainConfig]) -> list[str]:
    """How the run of the first seed is trained with ``fastfisher train``, for each case."""
    defaults = TrainConfig()
    skipped = ("out", "resume", "data_dir", "download", "device", "threads", "start_from")
    lines = ["<details><summary>Options of <code>fastfisher train</code></summary>", ""]
    for key, config in configs.items():
        words = []
        for name, default in vars(defaults).items():
            value = getattr(config, name)
            if name in skipped or value == default:
                continue
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            words.append(flag(name) if value is True else f"{flag(name)} {shown}")
        start = ", from the weights of another run" if config.start_from else ""
        lines.append(f"- {', '.join(key)}{start}: `{' '.join(words)}`")
    return [*lines, "", "</details>", ""]


def summary_of_claims(checks: Mapping[str, Sequence[Check]]) -> list[str]:
    """Return a line for each of the twelve claims: what the paper says, and what the experiments show."""
    lines = []
    for claim, statement in CLAIMS.items():
        parts = [(name, check) for name, found in checks.items() for check in found if check.claim == claim]
        verdict = together(check.verdict for _, check in parts) if parts else "undecided"
        numbers = "; ".join(
            f"[{name}]({name}.md): {check.number} {check}, claimed {check.claimed}: {check.verdict}"
            for name, check in parts
        )
        lines.append(f"{claim}. {statement} **{verdict.capitalize()}.** {numbers or 'Not looked at.'}")
    return lines
