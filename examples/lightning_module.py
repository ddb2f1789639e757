"""PyTorch Lightning with this project's loader. Lightning saves and restores the loader's position by itself, so a run
resumes inside the epoch:

python examples/lightning_module.py DATA FOLDER [STEPS]
"""

import sys

import pytorch_lightning as lightning
import torch
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from pipeline import EvalLoader, TrainLoader


class Classifier(lightning.LightningModule):
    def __init__(self, data: str, num_classes: int):
        super().__init__()
        self.data, self.network = data, resnet18(num_classes=num_classes)
        self.digests: dict[int, str] = {}

    def train_dataloader(self) -> TrainLoader:  # called when the ranks are there
        return TrainLoader(self.data, batch_size=24, image_size=64, augment="trivialaugment", mixup=0.2)

    def val_dataloader(self) -> EvalLoader:
        return EvalLoader(self.data, batch_size=24, image_size=64)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        images, targets = batch
        loader = self.trainer.train_dataloader
        self.digests[self.global_step] = loader.digest(loader.step - 1)
        return cross_entropy(self.network(images), targets)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        images, targets = batch
        accuracy = (self.network(images).argmax(1) == targets).float().mean()
        self.log("val_top1", accuracy, batch_size=len(targets), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(data: str, folder: str, steps: int, resume: str | None = None) -> Classifier:
    """Train until `steps` steps are done, from a checkpoint or from the beginning."""
    lightning.seed_everything(0, verbose=False)
    module = Classifier(data, TrainLoader(data).num_classes)
    trainer = lightning.Trainer(
        max_steps=steps,
        default_root_dir=folder,
        use_distributed_sampler=False,  # the loader gives each rank its part
        enable_progress_bar=False,
        logger=False,
    )
    trainer.fit(module, ckpt_path=resume)
    trainer.save_checkpoint(f"{folder}/step-{steps}.ckpt")
    return module


if __name__ == "__main__":
    fit(sys.argv[1], sys.argv[2], int((*sys.argv, 10)[3]))
