"""ImageNet (Russakovsky et al., 2015) and ImageNet-V2 (Recht et al., 2019)."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch.utilities import rank_zero_warn
from torchvision.datasets.imagenet import ARCHIVE_META, load_meta_file, parse_devkit_archive

from calib_lightning.data.archives import extract
from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.card import Card
from calib_lightning.data.downloads import DownloadedDataModule
from calib_lightning.data.folders import check_counts, class_files
from calib_lightning.data.sets import ImageFiles
from calib_lightning.data.source import Source
from calib_lightning.data.split import SplitSpec
from calib_lightning.data.web_files import Archive, fetch, locked
from calib_lightning.utils.images import CROP_MODES, CropMode, Frame

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Variant = Literal["matched-frequency", "threshold-0.7", "top-images"]
"""How the images of ImageNet-V2 were selected from those labelled by people."""
_PAGE = "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"


def imagenet_classes() -> dict[str, str]:
    """Names of the ImageNet classes by WordNet id, in label order, from timm."""
    from timm.data.imagenet_info import ImageNetInfo  # takes seconds

    info: Any = ImageNetInfo("imagenet-1k")
    return {wnid: info.index_to_description(label) for label, wnid in enumerate(info.label_names())}


def imagenet_frame(size: int, crop_mode: CropMode) -> Frame:
    """The usual preparation of ImageNet's evaluation images, with bilinear interpolation.

    "center" resizes the shorter side to 8/7 of ``size`` (256 for 224) and crops; "squash" resizes both sides.
    """
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1. The usual size is 224.")
    if crop_mode not in CROP_MODES:
        raise ValueError(f"crop_mode is {crop_mode!r}; it must be one of {', '.join(CROP_MODES)}.")
    return Frame((size, size), crop_pct=0.875 if crop_mode == "center" else 1.0, crop_mode=crop_mode)


class ImageNetDataModule(BenchmarkDataModule):
    """ImageNet, ILSVRC 2012: 1,281,167 training and 50,000 test images in 1,000 classes (Russakovsky et al., 2015).

    The test images are the official validation images; by default, half of them, 25 per class, are for calibration
    instead. The files are organised as for torchvision, in ``train/<WordNet id>/`` and ``val/<WordNet id>/``. Without
    ``train`` the module is for evaluation only. Labels are the ranks of the ids.

    Args:
        split: How the files are divided; by default, 25,000 validation images are for calibration, the others for
            testing.
        root: Folder with ``val`` and ``train``, or with the official archives to unpack there.
        augment: Whether training images are cropped (8 % to all of the area) and mirrored at random.
        size: Height and width of the network's input in pixels.
        crop_mode: "center" (resize to 8/7 of the size, then crop) or "squash" (resize both sides, like NCToolkit).
        mean: Mean of each channel, as a fraction; 0.5 for timm's ViT and Mixer.
        std: Standard deviation of each channel, as a fraction; 0.5 for timm's ViT and Mixer.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Raises:
        ValueError: If a value is invalid.

    Example:
        >>> ImageNetDataModule(root="data/imagenet", size=224).num_classes
        1000

    Deviations:
        Tang et al. (Neural Clamping) have not published their halves. Ours are drawn with seed 0 and saved with the
        run.
    """

    card = Card(
        1000,
        (1_281_167, 0, 50_000),
        (3, 224, 224),
        154_644_969_425,
        "non-commercial research and education",
        "https://image-net.org/download.php (by hand, with an account)",
    )
    num_classes = 1000
    crop_scale = (0.08, 1.0)
    default_split: ClassVar[SplitSpec] = SplitSpec(calibration=25_000, calibration_from="test")
    test_size: ClassVar[int] = 50_000

    def __init__(
        self,
        split: SplitSpec | None = None,
        *,
        root: str | Path = "data/imagenet",
        augment: bool = True,
        size: int = 224,
        crop_mode: CropMode = "center",
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        self.root, self.mean, self.std = Path(root).expanduser().resolve(), mean, std
        self.augment, self._frame = augment, imagenet_frame(size, crop_mode)

    def prepare_data(self) -> None:
        """Unpack the official archives if their folders are missing; processes take turns.

        Raises:
            FileNotFoundError: If there are neither the validation images nor their archives.
            ValueError: If an archive is damaged.
        """
        for name, unpack in (("val", self._unpack_val), ("train", self._unpack_train)):
            folder = self.root / name
            if folder.is_dir() or not self._archive(name).is_file():
                continue
            with locked(folder):
                if folder.is_dir():  # another process has unpacked it
                    continue
                with TemporaryDirectory(prefix=".unpacking-", dir=self.root) as temporary:
                    unpack(Path(temporary) / name)
                    (Path(temporary) / name).rename(folder)
        self._check("val", (self.root / "val").is_dir())
        super().prepare_data()

    def load_train(self) -> Source | None:
        """List the training images; ``None`` without a folder of them."""
        return self._list("train") if (self.root / "train").is_dir() else None

    def load_test(self) -> Source:
        """List the official validation images.

        Raises:
            FileNotFoundError: If the folder or all images of a class are missing.
            ValueError: If there are too few for the split.
        """
        self._check("val", (self.root / "val").is_dir())
        source, folder = self._list("val"), self.root / "val"
        self.class_names = tuple(imagenet_classes().values())
        found, taken = len(source.label), self.split.calibration
        if found != self.test_size:
            rank_zero_warn(
                f"{folder} has {found} images instead of {self.test_size}: results are not comparable with ImageNet's."
            )
        if self.split.calibration_from == "test" and not self.split.share and taken >= found:
            raise ValueError(
                f"split.calibration is {taken}; it must be below {found}, the number of images in {folder}. Set "
                "split.calibration=0 to make all of them test images, or a fraction with split.choose=proportional."
            )
        return source

    def _list(self, name: str) -> Source:
        files, label = class_files(self.root / name, list(imagenet_classes()), (".jpeg", ".jpg", ".png"))
        return Source(ImageFiles(self.root / name, files, self._frame), label)

    def _archive(self, name: str) -> Path:
        return self.root / str(ARCHIVE_META[name][0])

    def _checked(self, name: str) -> Path:
        """Verify the checksum of an official archive."""
        self._check(name, self._archive(name).is_file())
        file, md5 = ARCHIVE_META[name]
        return fetch(Archive(_PAGE, file, md5), self.root)  # it exists, so nothing is downloaded

    def _unpack_val(self, folder: Path) -> None:
        """Unpack the validation images and sort them into class folders, following the devkit."""
        parse_devkit_archive(folder.parent, str(self._checked("devkit")))
        wnids = load_meta_file(folder.parent)[1]
        extract(self._checked("val"), folder)
        names = sorted(path.name for path in folder.iterdir())
        if len(names) != len(wnids):
            raise ValueError(
                f"{self._archive('val')} has {len(names)} images; it must have {len(wnids)}, as stated in the devkit. "
                f"Get both again from {_PAGE}."
            )
        for wnid in set(wnids):
            (folder / wnid).mkdir()
        for name, wnid in zip(names, wnids, strict=True):
            (folder / name).rename(folder / wnid / name)

    def _unpack_train(self, folder: Path) -> None:
        """Unpack the training images, an archive of one archive per class."""
        extract(self._checked("train"), folder)
        for archive in sorted(folder.glob("*.tar")):
            extract(archive, folder / archive.stem)
            archive.unlink()

    def _check(self, name: str, there: bool) -> None:
        """Raise an error that says what is missing: ImageNet cannot be downloaded without an account."""
        if not there:
            val, train, devkit = (ARCHIVE_META[part][0] for part in ("val", "train", "devkit"))
            what = f"the archive {devkit}" if name == "devkit" else "the folder val/ with a folder for each class"
            raise FileNotFoundError(
                f"root is {str(self.root)!r}, which lacks {what}. Set root to the folder that contains val/ (and "
                f"train/, for training), or get {val} and {devkit} (and {train}) from {_PAGE} and put them there."
            )


class ImageNetV2DataModule(DownloadedDataModule):
    """ImageNet-V2: 10,000 new test images, 10 per class of ImageNet (Recht et al., ICML 2019), for evaluation.

    The set is ``shift/imagenet_v2_matched_frequency``, ``..._threshold_0_7`` or ``..._top_images``.

    Args:
        split: Unused: there is nothing to split.
        root: Folder that holds, or will hold, the folder of the unpacked archive.
        download: Whether to download missing files.
        variant: "matched-frequency", "threshold-0.7" or "top-images".
        size: Height and width of the network's input in pixels.
        crop_mode: As in `ImageNetDataModule`.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Raises:
        ValueError: If a value is invalid.

    Example:
        >>> ImageNetV2DataModule(variant="top-images", root="data").num_classes
        1000

    Deviations:
        There is no published checksum; the numbers of classes and images are checked. Folders are ordered numerically:
        alphabetically, as in ``ImageFolder``, "10" would be class 2.
    """

    card = Card(1000, (0, 0, 10_000), (3, 224, 224), 1_260_000_000, "MIT", "https://github.com/modestyachts/ImageNetV2")
    num_classes = 1000
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    unpacks = True
    class_count: ClassVar[int] = 10  # images per class

    def __init__(
        self,
        split: SplitSpec | None = None,
        *,
        root: str | Path = "data",
        download: bool = True,
        variant: Variant = "matched-frequency",
        size: int = 224,
        crop_mode: CropMode = "center",
        **options: Any,
    ) -> None:
        super().__init__(split, root=root, download=download, **options)
        if variant not in get_args(Variant):
            raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(get_args(Variant))}.")
        self.variant, self._frame = variant, imagenet_frame(size, crop_mode)
        name = f"imagenetv2-{variant.replace('threshold-', 'threshold')}"
        self.archives = (
            Archive(f"https://imagenetv2public.s3-us-west-2.amazonaws.com/{name}.tar.gz", f"{name}.tar.gz"),
        )
        self._images = self.root / f"{name}-format-val"

    def load_more(self) -> dict[str, Source]:
        """List the images.

        Raises:
            FileNotFoundError: If the folder or all images of a class are missing.
            ValueError: If there are not 10 per class.
        """
        if self.faults():
            raise self.not_found("prepare_data() has not run on this machine")
        classes = [str(label) for label in range(self.num_classes)]
        names, label = class_files(self._images, classes, (".jpeg",))
        check_counts(self._images, classes, label, self.class_count)
        self.class_names = tuple(imagenet_classes().values())
        name = self.variant.replace("-", "_").replace(".", "_")
        return {f"shift/imagenet_v2_{name}": Source(ImageFiles(self._images, names, self._frame), label)}

    def bad_files(self) -> dict[str, str]:
        """The folder of the images, if missing."""
        return {} if self._images.is_dir() else {f"{self._images.name}/": "missing"}
