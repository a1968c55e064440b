"""The error of each step, from which the default ones were chosen: ``python -m bench.step_size``.

Relative error of the penalty's gradient, finite differences against double backprop in the same precision, worst over
SimpleCNN and VGG-11, at initialisation and after 50 steps, on digits and on noise. With frozen gates a shorter step is
better until rounding shows; with free gates none is good, because a step over a kink adds what double backprop does not
see. Writes ``bench/results/step_size.md``.
"""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

import fastfisher
from bench.problems import digits, gradient, noise, relative_error, trained

STEPS = (1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 2e-4, 1e-4, 3e-5)
WAYS = (("frozen", "forward"), ("frozen", "central"), ("free", "forward"))
RESULT = Path(__file__).parent / "results" / "step_size.md"


def main() -> None:
    """Prints the table in Markdown, and keeps it."""
    worst = {(way, step): 0.0 for way in WAYS for step in STEPS}
    points = list(itertools.product(("simple_cnn", "vgg11"), (digits, noise), (0, 50)))
    warnings.simplefilter("ignore")
    for name, data, steps in tqdm(points, unit="network"):
        images, targets = data()
        model, x = trained(name, images, targets, steps), images[:32]
        labels = fastfisher.sample_cross_entropy(model(x))[1]
        exact = gradient(model, fastfisher.penalty(model, x, labels=labels))
        for (way, step), error in worst.items():
            gates, difference = way
            value = fastfisher.penalty(
                model, x, labels=labels, method="finite_difference", gates=gates, difference=difference, step=step
            )
            worst[way, step] = max(error, relative_error(gradient(model, value), exact))
    lines = [
        "Relative error of the penalty's gradient against double backprop, worst over SimpleCNN and VGG-11, at",
        "initialisation and after 50 steps, on digits and on noise; 32 images, float32, torch "
        f"{torch.__version__}, by `python -m bench.step_size`.",
        "",
        "| ρ | " + " | ".join(f"{gates} gates, {difference}" for gates, difference in WAYS) + " |",
        "|---" * (1 + len(WAYS)) + "|",
        *(f"| {step:.0e} | " + " | ".join(f"{worst[way, step]:.1e}" for way in WAYS) + " |" for step in STEPS),
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
