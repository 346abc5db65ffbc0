"""Train: `python train.py experiment=pretrain_tiny` (see conf/train.yaml, conf/experiment/)."""

from kvsmith.pipeline.config import launch
from kvsmith.pipeline.train import TrainConfig, run

if __name__ == "__main__":
    launch("train", TrainConfig, run, processes=True)
