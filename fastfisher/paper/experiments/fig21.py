"""Figure 21: Tr(H) and Tr(F) over training."""

from __future__ import annotations

from matplotlib.figure import Figure

from fastfisher.paper.cases import Case, Key, Scale, case
from fastfisher.paper.claims import Check
from fastfisher.paper.drawing import curves, panels
from fastfisher.paper.experiment import Experiment, Outcome, maximum, rank_correlation
from fastfisher.paper.settings import CIFAR10, DENSENET, DIGITS_NETWORKS, SIMPLE_CNN, digits_notes, table_1

MEASURED = {"measure": "trace_fisher_batch,trace_hessian"}
MAX_BATCH_TRACE = maximum("trace_fisher_batch", "maximum of Tr(F_B)")
MAX_HESSIAN = maximum("trace_hessian", "maximum of Tr(H)")


def cases(scale: Scale) -> dict[Key, Case]:
    """Three networks; Tr(F) is that of a mini-batch, as in supplement F."""
    found: dict[Key, Case] = {
        (name,): table_1(setting, scale)["η*"].but(**MEASURED)
        for name, setting in (("DenseNet", DENSENET), ("SimpleCNN", SIMPLE_CNN))
    }
    if scale == "paper":
        residual = case({**CIFAR10, **MEASURED}, network="resnet56", lr=0.02, batch_size=128, trace_samples=128)
    else:
        residual = case({**DIGITS_NETWORKS["cifar10"], **MEASURED}, network="resnet14", lr=0.0178, trace_samples=64)
    return {**found, ("ResNet-56" if scale == "paper" else "ResNet-14",): residual.without("trace_thresholds")}


def draw(figure: Figure, outcome: Outcome) -> None:
    """A panel for each network, the two on axes of their own."""
    for axes, key in zip(panels(figure, 1, len(outcome.runs)), outcome.runs, strict=True):
        curves(axes, outcome, {"Tr(H)": key}, "trace_hessian", "Tr(H)", colours=["#D55E00"], logarithmic=True)
        other = axes.twinx()
        curves(other, outcome, {"Tr(F_B)": key}, "trace_fisher_batch", "Tr(F_B)", colours=["#0072B2"], logarithmic=True)
        axes.yaxis.label.set_color("#D55E00")
        other.yaxis.label.set_color("#0072B2")
        axes.set_title(key[0], fontsize="medium")


def checks(outcome: Outcome) -> list[Check]:
    """Claim 10, the mean of the networks."""
    values = rank_correlation(outcome, list(outcome.runs), "trace_fisher_batch", "trace_hessian", apart=True)
    number = "rank correlation of Tr(F_B) and Tr(H) over training"
    return [Check("Tr(F) and Tr(H) correlate", number, values, above=0, claim=10)]


EXPERIMENT = Experiment(
    title="Tr(H) and Tr(F) of a mini-batch over training",
    cases=cases,
    quantities=(MAX_HESSIAN, MAX_BATCH_TRACE),
    draw=draw,
    checks=checks,
    notes=lambda scale: [
        "In evaluation mode these networks are piecewise linear in each parameter, so that Tr(H) is Tr(F) exactly, and "
        "computed so; what is compared with it is the squared norm of one mini-batch's gradient, as in the paper.",
        *digits_notes(scale),
    ],
    size=(13.0, 4.0),
)
