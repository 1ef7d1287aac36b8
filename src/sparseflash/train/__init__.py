"""A small, readable trainer: a byte-level GPT with any attention of the registry."""

from sparseflash.train.config import TrainConfig
from sparseflash.train.data import Corpus, load
from sparseflash.train.errors import TrainError
from sparseflash.train.log import Row
from sparseflash.train.model import GPT
from sparseflash.train.parallel import World
from sparseflash.train.sampling import fill, load_model, sample
from sparseflash.train.trainer import Trainer, resume_config

__all__ = [
    "GPT",
    "Corpus",
    "Row",
    "TrainConfig",
    "TrainError",
    "Trainer",
    "World",
    "fill",
    "load",
    "load_model",
    "resume_config",
    "sample",
]
