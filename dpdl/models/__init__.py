"""Small image models that keep examples apart, for the demo, the benchmarks and the tables of the papers.

All take images [N, C, H, W] in [0, 1] and give one logit a class, [N, classes].
"""

from dpdl.models.dense import logistic, mlp
from dpdl.models.papernot_cnn import papernot_cnn
from dpdl.models.registry import MODEL_NAMES, automatic_name, build_model
from dpdl.models.tramer_boneh_cifar_cnn import tramer_boneh_cifar_cnn

__all__ = [
    "MODEL_NAMES",
    "automatic_name",
    "build_model",
    "logistic",
    "mlp",
    "papernot_cnn",
    "tramer_boneh_cifar_cnn",
]
