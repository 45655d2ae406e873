"""Workloads say what is learned. Import from here what a workload's file needs."""

from mnist_ray.data.data import Arrays, Blocks, Data
from mnist_ray.settings import Choice, Range, at_least, fraction, positive, setting, within
from mnist_ray.workload.base import ACCURACY, Metric, Picture, Workload
from mnist_ray.workload.classification import Classification
from mnist_ray.workload.regression import Regression

__all__ = [
    "ACCURACY",
    "Arrays",
    "Blocks",
    "Choice",
    "Classification",
    "Data",
    "Metric",
    "Picture",
    "Range",
    "Regression",
    "Workload",
    "at_least",
    "fraction",
    "positive",
    "setting",
    "within",
]
