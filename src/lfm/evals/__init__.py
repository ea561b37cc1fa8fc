"""Metrics that any model can be held against, each with a confidence interval."""

from lfm.evals.estimate import Metric as Metric
from lfm.evals.evaluation import Comparison as Comparison
from lfm.evals.evaluation import Evaluation as Evaluation
from lfm.evals.evaluation import Sample as Sample
from lfm.evals.evaluation import compare as compare
from lfm.evals.evaluation import evaluate as evaluate
from lfm.evals.setting import suits as suits
