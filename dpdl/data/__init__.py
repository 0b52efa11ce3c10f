"""Images in memory: from files, or the embedded demo digits, to tensors that are ready to train on.

Everything that these readers return is private data: pixels, labels, and how many of each there are.
"""

from dpdl.data.cifar import load_cifar10
from dpdl.data.demo_digits import load_demo_digits
from dpdl.data.detect import load
from dpdl.data.idx import load_idx
from dpdl.data.image_data import ImageData, Progress
from dpdl.data.image_folder import load_image_folder

__all__ = [
    "ImageData",
    "Progress",
    "load",
    "load_cifar10",
    "load_demo_digits",
    "load_idx",
    "load_image_folder",
]
