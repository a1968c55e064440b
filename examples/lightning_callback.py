"""Lightning: the Fisher penalty in a LightningModule's training, and Tr(F) in its log."""

import argparse

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from fastfisher.integrations.lightning import FisherPenaltyCallback, FisherTraceMonitor


class Digits(LightningModule):
    """A classifier as any other: nothing in it knows of the penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):  # noqa: D102
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):  # noqa: D102
        return torch.optim.SGD(self.parameters(), lr=0.1)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--out", default="lightning_logs")
arguments = parser.parse_args()

images, labels = load_digits(return_X_y=True)
data = torch.utils.data.TensorDataset(torch.tensor(images).float() / 16, torch.tensor(labels))
callbacks = [FisherPenaltyCallback(alpha=0.1, network="model"), FisherTraceMonitor(every_n_steps=10, network="model")]
trainer = Trainer(
    max_steps=arguments.steps, callbacks=callbacks, logger=CSVLogger(arguments.out), accelerator="cpu",
    log_every_n_steps=10, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Digits(), torch.utils.data.DataLoader(data, batch_size=128, shuffle=True))
print(f"R = {callbacks[0].penalty.value:.4f}; Tr(F) over the training is in {trainer.logger.log_dir}/metrics.csv")
