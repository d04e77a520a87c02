"""Conversion of image files to the inputs of a network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from calib_lightning.utils.images import CROP_MODES, FILTERS, MODES, CropMode, Frame, upright


class ImageData(Protocol):
    """The part of a data module that `Preprocessing.from_data` reads."""

    mean: Sequence[float]
    std: Sequence[float]

    def evaluation_loaders(self) -> Mapping[str, Iterable[Any]]:
        """Loaders by name; the first item of a batch is images ``(N, C, H, W)``."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and standardise an image: ``(x / 255 - mean) / std`` for each channel.

    The EXIF orientation is applied, the image is converted to grey or RGB, and transparency is dropped.

    Args:
        size: Height and width of the network's input, in pixels.
        mean: Mean of each channel, as a fraction of full brightness: one value for grey images, three for RGB.
        std: Standard deviation of each channel, in the same unit.
        crop_pct: Ratio of ``size`` to the size before the centre crop, in ``(0, 1]``.
        crop_mode: ``"center"`` keeps the aspect ratio and crops the centre, ``"squash"`` changes the aspect ratio.
        interpolation: ``"nearest"``, ``"box"``, ``"bilinear"``, ``"hamming"``, ``"bicubic"`` or ``"lanczos"``.

    Raises:
        ValueError: A value is not allowed.

    Example:
        >>> prepare = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,))
        >>> prepare(Image.new("RGB", (20, 10), "white")).shape
        torch.Size([1, 8, 8])
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name, kind in (("size", int), ("mean", float), ("std", float)):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), kind))
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size is {self.size!r}; it must be height and width in pixels, such as (224, 224).")
        if len(self.mean) not in MODES or len(self.std) != len(self.mean):
            raise ValueError(
                f"mean is {self.mean!r} and std is {self.std!r}; they must have one value each for grey images, or "
                "three each for RGB."
            )
        if not all(map(math.isfinite, self.mean)) or not all(0.0 < value < math.inf for value in self.std):
            raise ValueError(f"mean is {self.mean!r} and std is {self.std!r}; they must be finite, and std above 0.")
        if not isinstance(self.crop_pct, int | float) or not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"crop_pct is {self.crop_pct!r}; it must be in (0, 1]. 1 crops only the longer side.")
        for name, allowed in (("crop_mode", CROP_MODES), ("interpolation", tuple(FILTERS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")

    @classmethod
    def from_timm(cls, model: nn.Module) -> Preprocessing:
        """Take the preprocessing of a timm model from `timm.data.resolve_data_config`.

        Args:
            model: A timm model, or another one with a ``pretrained_cfg``.

        Returns:
            The preprocessing of `timm.data.create_transform` for evaluation.

        Raises:
            ValueError: The model has no ``pretrained_cfg``, or one with unsupported values.
        """
        if not getattr(model, "pretrained_cfg", None):
            raise ValueError(
                f"{type(model).__name__} has no pretrained_cfg, in which timm models specify their preprocessing. "
                "Write Preprocessing(size=..., mean=..., std=...)."
            )
        import timm.data  # the import takes seconds

        resolve: Any = timm.data.resolve_data_config  # type: ignore[attr-defined]  # timm does not re-export it by name
        config = resolve(model=model)
        return cls(
            size=tuple(config["input_size"][1:]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            interpolation=config["interpolation"],
        )

    @classmethod
    def from_data(cls, data: ImageData) -> Preprocessing:
        """Take the preprocessing of evaluation images from a data module of this package.

        Args:
            data: A data module, after ``setup()``. Its ``frame``, if any, defines how files are resized and cropped.

        Returns:
            Its frame, or resizing to the size of its images, with its mean and standard deviation.

        Example:
            ``Preprocessing.from_data(DigitsDataModule())``
        """
        mean, std = tuple(data.mean), tuple(data.std)
        frame: Frame | None = getattr(data, "frame", None)
        if frame is None:
            image = next(iter(next(iter(data.evaluation_loaders().values()))))[0]
            return cls(tuple(image.shape[-2:]), mean, std)
        return cls(frame.size, mean, std, frame.crop_pct, frame.crop_mode, frame.interpolation)

    @classmethod
    def from_run(cls, run: str | Path) -> Preprocessing:
        """Take the preprocessing of evaluation images from a run of `calib fit` on data of this package.

        Args:
            run: Folder of the run.

        Returns:
            The preprocessing.

        Raises:
            ValueError: It is not the folder of a run, or does not record the preprocessing.

        Example:
            ``CalibratedClassifier(load_module(checkpoint), preprocessing=Preprocessing.from_run("RUN"))``
        """
        path = Path(run) / "run.json"
        facts = json.loads(path.read_text(encoding="utf-8")).get("images") if path.is_file() else None
        if not facts:
            raise ValueError(
                f"{path} does not say how images are prepared. Write Preprocessing(size=..., mean=..., std=...)."
            )
        options = {name: facts[name] for name in ("crop_pct", "crop_mode", "interpolation") if name in facts}
        return cls(size=tuple(facts["shape"][1:]), mean=tuple(facts["mean"]), std=tuple(facts["std"]), **options)

    @classmethod
    def from_record(cls, record: Any) -> Preprocessing:
        """Build a preprocessing from its record.

        Args:
            record: Plain data as in `record`, possibly from an untrusted file.

        Returns:
            The preprocessing.

        Raises:
            ValueError: It is not a valid record.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(record, Mapping) or set(record) != set(names):
            raise ValueError(f"the preprocessing is {record!r:.200}; it must have the entries {', '.join(names)}.")
        return cls(**record)

    @property
    def record(self) -> dict[str, Any]:
        """Plain data, from which `from_record` builds an equal object."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of the output."""
        return (len(self.mean), *self.size)

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert one image.

        Args:
            image: Of any size, with 8 bits per channel.

        Returns:
            ``(C, H, W)`` float32.

        Raises:
            ValueError: The image has more than 8 bits per channel, or an extreme aspect ratio.
        """
        frame = Frame(self.size, len(self.mean), self.crop_pct, self.crop_mode, self.interpolation)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((frame(upright(image)).float() / 255 - mean) / std).contiguous()


def _numbers(name: str, values: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} is {values!r}; it must be a sequence of numbers.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | kind):
            numbers = "whole numbers" if kind is int else "numbers"
            raise ValueError(f"{name} is {values!r}; it must be a sequence of {numbers}.")
    return tuple(kind(value) for value in values)
