"""Data sets of images with labels: folders, tables, Parquet files, shards, Hub data sets, any torch `Dataset`, lists, streams.

    train = open_dataset("flowers/", split="train", shots=16)
    train, val = split_train_val(train, 0.1, seed=0)

Everything is an `ImageDataset`: rows of a source, a selection of them, class names and a transform.
"""

from zoo.data.dataset import ImageDataset, Skipped, collate
from zoo.data.joined import by_class, join, shuffled_labels, with_classes
from zoo.data.open import open_dataset
from zoo.data.sampling import class_weights, few_shot, split_train_val

__all__ = [
    "ImageDataset",
    "Skipped",
    "by_class",
    "class_weights",
    "collate",
    "few_shot",
    "join",
    "open_dataset",
    "shuffled_labels",
    "split_train_val",
    "with_classes",
]
