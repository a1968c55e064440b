"""Per-example gradient norms of architectures from timm and torchvision: ``python -m bench.architectures``.

Each is built without weights, in float64, and given 4 small random images. The table says whether every parameter has a
formula, which take a backward for each example and why, or why it is refused; and the largest relative error of
‖∇ℓ(x_i, y_i)‖² against one backward per example. Writes bench/results/architectures.md.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from bench.problems import torchvision_operators

EXAMPLES = 4
CLASSES = 10


@dataclass(frozen=True)
class Architecture:
    """One network by its name in a library, the side of the images it gets, and its own options."""

    library: str
    name: str
    size: int
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network with random weights, in eval mode and float64."""
        torch.manual_seed(0)
        if self.library == "torchvision":
            import torchvision  # type: ignore[import-untyped, unused-ignore]

            model = torchvision.models.get_model(self.name, weights=None, num_classes=CLASSES, **self.options)
        else:
            import timm  # type: ignore[import-not-found, unused-ignore]

            model = timm.create_model(self.name, pretrained=False, num_classes=CLASSES, **self.options)
        network: nn.Module = model.eval().double()
        return network


_GOOGLE = {"aux_logits": False, "init_weights": False}
ARCHITECTURES = [
    Architecture("torchvision", "resnet18", 32),
    Architecture("torchvision", "resnet50", 32),
    Architecture("torchvision", "densenet121", 32),
    Architecture("torchvision", "mobilenet_v2", 32),
    Architecture("torchvision", "mobilenet_v3_small", 32),
    Architecture("torchvision", "efficientnet_b0", 32),
    Architecture("torchvision", "regnet_y_400mf", 32),
    Architecture("torchvision", "shufflenet_v2_x0_5", 32),
    Architecture("torchvision", "squeezenet1_1", 32),
    Architecture("torchvision", "googlenet", 32, _GOOGLE),
    Architecture("torchvision", "inception_v3", 80, _GOOGLE),
    Architecture("timm", "nfnet_l0", 32),
    Architecture("timm", "convnext_atto", 32),
    Architecture("timm", "convmixer_768_32", 32),
    Architecture("timm", "poolformer_s12", 32),
    Architecture("timm", "vit_tiny_patch16_224", 32, {"img_size": 32}),
    Architecture("timm", "deit_tiny_patch16_224", 32, {"img_size": 32}),
    Architecture("timm", "swin_tiny_patch4_window7_224", 32, {"img_size": 32}),
    Architecture("timm", "cait_xxs24_224", 32, {"img_size": 32}),
    Architecture("timm", "xcit_nano_12_p16_224", 32, {"img_size": 32}),
    Architecture("timm", "eva02_tiny_patch14_224", 28, {"img_size": 28}),
    Architecture("timm", "mixer_s32_224", 32, {"img_size": 32}),
    Architecture("timm", "resmlp_12_224", 32, {"img_size": 32}),
    Architecture("timm", "gmlp_s16_224", 32, {"img_size": 32}),
    Architecture("timm", "mobilevit_xxs", 64),
    Architecture("torchvision", "vgg11", 32),
]


@dataclass(frozen=True)
class Found:
    """What became of one architecture.

    Attributes:
        parameters: how many numbers it has.
        slow: what took a backward for each example, each with its reason, as the warning has it.
        refusal: why there is no result, or None.
        error: the largest relative error of a squared norm; NaN where it was refused.
    """

    parameters: int
    slow: list[str]
    refusal: str | None
    error: float

    @property
    def verdict(self) -> str:
        """In words."""
        if self.refusal is not None:
            return f"refused: {self.refusal}"
        return "; ".join(self.slow) or "formulas for every parameter"


def measure(architecture: Architecture) -> Found:
    """Squared norms by ``per_example_grad_norms`` beside those of one backward per example."""
    model = architecture.build()
    parameters = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 3, architecture.size, architecture.size, dtype=torch.float64, generator=generator)
    y = torch.arange(EXAMPLES)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            norms = fastfisher.per_example_grad_norms(model, x, y, labels="true")
        except (ValueError, RuntimeError) as error:
            return Found(parameters, [], str(error).splitlines()[0], float("nan"))
    slow = [str(w.message) for w in said if isinstance(w.message, fastfisher.SlowPathWarning)]
    # Of the whole batch: for a batch of one PyTorch's batch norm errs on the CPU, where the gradient of its output has
    # channels last (torch 2.13).
    losses = F.cross_entropy(model(x), y, reduction="none")
    exact = torch.stack([squared_norm(loss, list(model.parameters())) for loss in losses])
    return Found(parameters, slow, None, float(((norms - exact).abs() / exact).max()))


def squared_norm(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """‖∇loss‖², the graph kept."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.stack([g.square().sum() for g in found if g is not None]).sum()


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these; then nothing is written")
    names = parser.parse_args().names
    chosen = [a for a in ARCHITECTURES if not names or a.name in names]
    lines = []
    with torchvision_operators():
        for architecture in chosen:
            found = measure(architecture)
            lines.append(
                f"| {architecture.name} | {architecture.library} | {found.parameters / 1e6:.1f} "
                f"| {architecture.size} | {found.verdict} | {found.error:.0e} |"
            )
            print(lines[-1], flush=True)
    if not names:
        formulas = sum("formulas for every" in line for line in lines)
        head = [
            f"`per_example_grad_norms` on {len(lines)} architectures, {EXAMPLES} random images each, without weights, "
            f"in float64, by `python -m bench.architectures`, torch {torch.__version__}: {formulas} by formulas alone. "
            "The last column is the largest relative error of ‖∇ℓ(x_i, y_i)‖² against one backward per example.",
            "",
            "| architecture | library | parameters, millions | image | per-example gradients | error |",
            "|---|---|---|---|---|---|",
        ]
        (Path(__file__).parent / "results" / "architectures.md").write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
