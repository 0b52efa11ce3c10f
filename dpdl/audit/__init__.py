"""Attacks and measures of leakage, as tools. None of them is a guarantee, and one that fails proves nothing."""

from dpdl.audit.decoder import DecoderResult, decoder_attack, recovered_variance
from dpdl.audit.distance_correlation import biased_distance_correlation, distance_correlation
from dpdl.audit.gradient_inversion import InversionResult, inferred_label, invert_update, update_of_one_example
from dpdl.audit.label_inference import LabelInference, infer_labels, rank_auc
from dpdl.audit.verdict import A_FAILURE_PROVES_NOTHING

__all__ = [
    "A_FAILURE_PROVES_NOTHING",
    "DecoderResult",
    "InversionResult",
    "LabelInference",
    "biased_distance_correlation",
    "decoder_attack",
    "distance_correlation",
    "infer_labels",
    "inferred_label",
    "invert_update",
    "rank_auc",
    "recovered_variance",
    "update_of_one_example",
]
