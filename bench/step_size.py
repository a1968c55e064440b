"""The error of each step, from which the default ones were chosen: ``python -m bench.step_size``.

Relative error of the penalty's gradient, finite differences with frozen gates against double backprop in the same
precision, worst over SimpleCNN and VGG-11, at initialisation and after 50 steps, on digits and on noise.
"""

from __future__ import annotations

import itertools
import warnings

import torch
from tqdm import tqdm

import fastfisher
from tests.networks import relative_error
from tests.test_penalty import digits, gradient, noise, trained

STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 2e-4, 1e-4, 3e-5)


def main() -> None:
    """Prints the table in Markdown."""
    worst = {(d, s): 0.0 for d in ("forward", "central") for s in STEPS}
    points = list(itertools.product(("simple_cnn", "vgg11"), (digits, noise), (0, 50)))
    warnings.simplefilter("ignore")
    for name, data, steps in tqdm(points, unit="network"):
        images, targets = data()
        model, x = trained(name, images, targets, steps), images[:32]
        labels = fastfisher.sample_cross_entropy(model(x))[1]
        exact = gradient(model, fastfisher.penalty(model, x, labels=labels))
        for (difference, step), error in worst.items():
            value = fastfisher.penalty(
                model, x, labels=labels, method="finite_difference", difference=difference, step=step
            )
            worst[difference, step] = max(error, relative_error(gradient(model, value), exact))
    print(f"float32, torch {torch.__version__}\n\n| ρ | forward | central |\n|---|---|---|")
    for step in STEPS:
        print(f"| {step:.0e} | {worst['forward', step]:.1e} | {worst['central', step]:.1e} |")


if __name__ == "__main__":
    main()
