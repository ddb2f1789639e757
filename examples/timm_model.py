"""Train a network of timm with your own loop, on the images that its authors cut for it, and score it:

python examples/timm_model.py DATA [MODEL] [EPOCHS]
"""

import sys

import timm
import torch
from torch.nn.functional import cross_entropy

from pipeline import EvalLoader, TrainLoader
from pipeline.config import DataConfig

data, name, epochs = sys.argv[1], (*sys.argv, "resnet18")[2], int((*sys.argv, "resnet18", 1)[3])
wanted = timm.data.resolve_data_config(model=timm.create_model(name))
size, settings = wanted["input_size"][1], DataConfig(mean=wanted["mean"], std=wanted["std"])
train = TrainLoader(data, batch_size=32, image_size=size, augment="randaugment", mixup=0.2, cutmix=1.0, data=settings)
val = EvalLoader(data, batch_size=64, image_size=size, resize=int(size / wanted["crop_pct"]), data=settings)
model = timm.create_model(name, num_classes=train.num_classes, drop_path_rate=0.05).to(train.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for epoch in range(epochs):
    model.train()
    for images, targets in train.epoch(epoch):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        correct = sum(int((model(images).argmax(1) == targets).sum()) for images, targets in val)
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {correct} of {val.num_samples} correct")
