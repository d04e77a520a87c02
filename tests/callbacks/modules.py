"""A LightningModule as somebody else has it: no base class of ours, tuple batches."""

import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset


class ForeignCode:
    """What is written in it, for a LightningModule of either package."""

    def __init__(self, calls_itself=True, lr=0.5):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)  # weights that rank the classes better than chance: a temperature within its bounds
            self.net = torch.nn.Linear(4, 3)
        self.calls_itself, self.lr, self.calls = calls_itself, lr, 0

    def forward(self, x):
        self.calls += not self.training
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        logits = self(batch[0]) if self.calls_itself else self.net(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        self.log("foreign_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Foreign(ForeignCode, LightningModule):
    pass


def rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (n,), generator=generator)
    x = torch.randn(n, 4, generator=generator)
    x[:, :3] += 1.5 * torch.nn.functional.one_hot(label, 3)
    return x, label


def loader(n, seed=0, batch_size=8):
    return DataLoader(TensorDataset(*rows(n, seed)), batch_size=batch_size)
