"""Train, resume, evaluate and read the ledger from Python: python examples/ten_lines.py DATA RUN"""

import sys

import pipeline

options = {"data.root": sys.argv[1], "run_dir": sys.argv[2], "train.max_steps": 4, "tracking.wandb": "disabled"}
config = pipeline.load_config("smoke", options)
if pipeline.train(config):  # False: it was asked to stop, and the same script resumes
    scores = pipeline.evaluate(sys.argv[2])
    losses = [row["loss"] for row in pipeline.read_ledger(sys.argv[2], "train")]
    print(f"{len(losses)} steps, last loss {losses[-1]:.3f}, top-1 {scores['val_top1']:.2f} %")
