"""Penalise and measure curvature through the Fisher Information Matrix, close to the cost of a plain training step."""

from fastfisher.distributed.messages import RankFailure
from fastfisher.engine.gates import Gates, record_gates
from fastfisher.engine.recording import AccuracyWarning
from fastfisher.likelihoods.base import Likelihood
from fastfisher.likelihoods.categorical import Categorical
from fastfisher.likelihoods.elementwise import Bernoulli, Gaussian, Poisson
from fastfisher.measure.covariance import GradientCovariance, gradient_covariance
from fastfisher.measure.estimate import TraceEstimate
from fastfisher.measure.fisher import FisherTrace, trace_fisher
from fastfisher.measure.hessian import trace_hessian
from fastfisher.measure.norms import GradInnerProducts, grad_inner_products, per_example_grad_norms
from fastfisher.measure.spectrum import TopEigenvalues, top_eigenvalues
from fastfisher.moved import keep_old_paths
from fastfisher.ops.head import linear_sample_cross_entropy
from fastfisher.ops.sampled import sample_binary_cross_entropy, sample_cross_entropy
from fastfisher.penalise.function import penalty
from fastfisher.penalise.gradient_penalty import GradientPenalty
from fastfisher.penalise.regularizer import FisherPenalty
from fastfisher.penalise.rho import AdaptiveStep
from fastfisher.slow_path import SlowPathWarning

__all__ = [
    "AccuracyWarning",
    "AdaptiveStep",
    "Bernoulli",
    "Categorical",
    "FisherPenalty",
    "FisherTrace",
    "Gates",
    "Gaussian",
    "GradInnerProducts",
    "GradientCovariance",
    "GradientPenalty",
    "Likelihood",
    "Poisson",
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
    "sample_binary_cross_entropy",
    "sample_cross_entropy",
    "top_eigenvalues",
    "trace_fisher",
    "trace_hessian",
]

keep_old_paths()
