"""A training loop of your own that can be killed at any moment and resumes on any number of ranks:

torchrun --nproc-per-node=2 examples/plain_loop.py DATA FOLDER [EPOCHS]
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from pipeline import TrainLoader

data, folder, epochs = sys.argv[1], Path(sys.argv[2]), int((*sys.argv, 2)[3])
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
loader = TrainLoader(data, batch_size=24, image_size=64, seed=0, augment="trivialaugment", mixup=0.2)
torch.manual_seed(0)
network = resnet18(num_classes=loader.num_classes).to(loader.device)
model = torch.nn.parallel.DistributedDataParallel(network)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
parts = {"network": network, "optimizer": optimizer, "loader": loader}
checkpoint = folder / "checkpoint.pt"
if checkpoint.exists():
    for name, state in torch.load(checkpoint, map_location=loader.device, weights_only=True).items():
        parts[name].load_state_dict(state)

for epoch in range(epochs):
    for images, targets in loader.epoch(epoch):  # after a resume: what was not seen yet
        optimizer.zero_grad()
        loss = cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        pixels = images.double().sum()
        dist.all_reduce(pixels)  # of the global batch
        if dist.get_rank() == 0:
            with (folder / "log.txt").open("a") as log:
                print(loader.step, loader.digest(loader.step - 1), pixels.item(), loss.item(), file=log)
        if loader.step % 3 == 0 and dist.get_rank() == 0:
            torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "new.pt")
            (folder / "new.pt").replace(checkpoint)
