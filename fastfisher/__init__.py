"""Penalise and measure curvature through the Fisher Information Matrix, close to the cost of a plain training step."""

from fastfisher.distributed import RankFailure
from fastfisher.estimate import TraceEstimate
from fastfisher.gates import AccuracyWarning, Gates, record_gates
from fastfisher.head import linear_sample_cross_entropy
from fastfisher.hessian import trace_hessian
from fastfisher.labels import sample_cross_entropy
from fastfisher.penalty import AdaptiveStep, penalty
from fastfisher.regularizer import FisherPenalty
from fastfisher.slow_path import SlowPathWarning
from fastfisher.spectrum import GradientCovariance, TopEigenvalues, gradient_covariance, top_eigenvalues
from fastfisher.traces import FisherTrace, GradInnerProducts, grad_inner_products, per_example_grad_norms, trace_fisher

__all__ = [
    "AccuracyWarning",
    "AdaptiveStep",
    "FisherPenalty",
    "FisherTrace",
    "Gates",
    "GradInnerProducts",
    "GradientCovariance",
    "RankFailure",
    "SlowPathWarning",
    "TopEigenvalues",
    "TraceEstimate",
    "grad_inner_products",
    "gradient_covariance",
    "linear_sample_cross_entropy",
    "penalty",
    "per_example_grad_norms",
    "record_gates",
    "sample_cross_entropy",
    "top_eigenvalues",
    "trace_fisher",
    "trace_hessian",
]
