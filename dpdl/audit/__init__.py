"""Attacks and measures of leakage, as tools. None of them is a guarantee, and one that fails proves nothing."""

from dpdl.audit.assertion import AuditFailure, assert_private
from dpdl.audit.canaries import Canaries, mislabelled
from dpdl.audit.decoder import DecoderResult, decoder_attack, recovered_variance
from dpdl.audit.distance_correlation import biased_distance_correlation, distance_correlation
from dpdl.audit.gradient_canaries import DirectionsOnly, GradientCanaries
from dpdl.audit.gradient_inversion import InversionResult, inferred_label, invert_update, update_of_one_example
from dpdl.audit.label_inference import LabelInference, infer_labels, rank_auc
from dpdl.audit.likelihood_ratio import lira
from dpdl.audit.many_runs import audit_many_runs
from dpdl.audit.membership import loss_threshold_attack
from dpdl.audit.membership_result import MembershipResult
from dpdl.audit.one_run import audit_gradients, audit_one_run
from dpdl.audit.result import AuditResult
from dpdl.audit.roc_plot import plot_roc
from dpdl.audit.shadow_models import ShadowModels, logit_confidence, train_shadow_models
from dpdl.audit.verdict import A_FAILURE_PROVES_NOTHING

__all__ = [
    "A_FAILURE_PROVES_NOTHING",
    "AuditFailure",
    "AuditResult",
    "Canaries",
    "DecoderResult",
    "DirectionsOnly",
    "GradientCanaries",
    "InversionResult",
    "LabelInference",
    "MembershipResult",
    "ShadowModels",
    "assert_private",
    "audit_gradients",
    "audit_many_runs",
    "audit_one_run",
    "biased_distance_correlation",
    "decoder_attack",
    "distance_correlation",
    "infer_labels",
    "inferred_label",
    "invert_update",
    "lira",
    "logit_confidence",
    "loss_threshold_attack",
    "mislabelled",
    "plot_roc",
    "rank_auc",
    "recovered_variance",
    "train_shadow_models",
    "update_of_one_example",
]
