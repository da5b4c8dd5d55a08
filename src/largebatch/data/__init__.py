"""Data sets, batched augmentation and the batches of a run."""

from largebatch.data.batches import BatchLoader
from largebatch.data.encoded import FileImages
from largebatch.data.images import MemoryImages, Split
from largebatch.data.load import Data, load_data
from largebatch.data.sampling import evaluation_share

__all__ = [
    "BatchLoader",
    "Data",
    "FileImages",
    "MemoryImages",
    "Split",
    "evaluation_share",
    "load_data",
]
