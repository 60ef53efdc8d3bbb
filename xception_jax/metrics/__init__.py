"""Defines metrics that merge across batches, devices and processes, and ignore padding.

`METRICS` lists the metrics of each loss, the main one first. The journal, the ranking of checkpoints, the report and
`evaluate` all take the name, direction and format of a metric from its object.
"""

from __future__ import annotations

from collections.abc import Callable

from xception_jax.config import ExperimentConfig
from xception_jax.metrics.metric import Metric, describe
from xception_jax.metrics.multi_label import MeanAveragePrecision, SigmoidLoss
from xception_jax.metrics.roc import AreaUnderROC
from xception_jax.metrics.single_label import SoftmaxLoss, TopK

__all__ = ["METRICS", "Metric", "describe", "main_metric", "metrics_of"]

# By loss name. To add a metric, add its class in this package and a line here.
METRICS: dict[str, Callable[[ExperimentConfig], tuple[Metric, ...]]] = {
    "softmax": lambda config: (TopK(1), TopK(5), AreaUnderROC(multi_label=False), SoftmaxLoss()),
    "sigmoid": lambda config: (
        MeanAveragePrecision(config.evaluation.map_at),
        MeanAveragePrecision(config.evaluation.map_at, over_all_labels=True),
        AreaUnderROC(multi_label=True),
        SigmoidLoss(),
    ),
}


def metrics_of(config: ExperimentConfig) -> tuple[Metric, ...]:
    """Returns the metrics of an experiment, the main one first."""
    return tuple(metric for metric in METRICS[config.loss.name](config) if metric.suits(config.num_classes))


def main_metric(config: ExperimentConfig) -> Metric:
    """Returns the metric that ranks the checkpoints and comes first in reports."""
    return metrics_of(config)[0]
