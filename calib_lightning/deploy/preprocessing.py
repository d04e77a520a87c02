"""How an image file becomes the tensor that a network was trained on."""

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
    """What `Preprocessing.from_data` reads of a data module."""

    mean: Sequence[float]
    std: Sequence[float]

    def evaluation_loaders(self) -> Mapping[str, Iterable[Any]]:
        """Loaders of batches whose first part is images ``(N, C, H, W)``, by name."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and standardise an image: ``(x / 255 - mean) / std``, one mean a channel.

    An image is turned upright, as the camera has noted, and becomes grey or RGB; transparency is dropped.

    Args:
        size: Height and width in pixels of what the network gets.
        mean: Mean of each channel, as a fraction of full brightness; one for grey images, three for RGB.
        std: Standard deviation of each channel, in the same unit.
        crop_pct: Size over the size that the image is resized to before the central crop, in ``(0, 1]``.
        crop_mode: ``"center"`` keeps the aspect ratio and cuts off what is outside the centre, ``"squash"`` does not
            keep it.
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
            raise ValueError(f"size={self.size!r}: give height and width in pixels, such as (224, 224)")
        if len(self.mean) not in MODES or len(self.std) != len(self.mean):
            raise ValueError(
                f"mean={self.mean!r}, std={self.std!r}: give one number each for grey images, three each for RGB"
            )
        if not all(map(math.isfinite, self.mean)) or not all(0.0 < value < math.inf for value in self.std):
            raise ValueError(f"mean={self.mean!r}, std={self.std!r}: they must be finite, and std above 0")
        if not isinstance(self.crop_pct, int | float) or not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"crop_pct={self.crop_pct!r}: it must be in (0, 1]; 1 crops nothing but the longer side")
        for name, allowed in (("crop_mode", CROP_MODES), ("interpolation", tuple(FILTERS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(allowed)}")

    @classmethod
    def from_timm(cls, model: nn.Module) -> Preprocessing:
        """Read the preparation of evaluation images from a timm model, as `timm.data.resolve_data_config` says it.

        Args:
            model: A timm model, or one with such a ``pretrained_cfg``.

        Returns:
            What `timm.data.create_transform` does with an image file.

        Raises:
            ValueError: The model does not say it, or asks for what is not known here.
        """
        if not getattr(model, "pretrained_cfg", None):
            raise ValueError(
                f"{type(model).__name__} does not say how images are prepared, as timm models do in pretrained_cfg; "
                "give Preprocessing(size=..., mean=..., std=...)"
            )
        import timm.data  # here: it takes seconds

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
        """Read the preparation from a data module of this package.

        Args:
            data: A data module, after ``setup()``. Its ``frame``, where it has one, says how its files are resized and
                cropped.

        Returns:
            Its frame, or resizing to the size of its images, and its standardisation.

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
        """Read the preparation from a run of `calib fit` on data of this package.

        Args:
            run: Its folder.

        Returns:
            The preparation of its evaluation images.

        Raises:
            ValueError: It is no run folder, or does not say how its images were prepared.

        Example:
            ``CalibratedClassifier(load_module(checkpoint), preprocessing=Preprocessing.from_run("RUN"))``
        """
        path = Path(run) / "run.json"
        facts = json.loads(path.read_text(encoding="utf-8")).get("images") if path.is_file() else None
        if not facts:
            raise ValueError(
                f"{path} does not say how images are prepared; give Preprocessing(size=..., mean=..., std=...)"
            )
        options = {name: facts[name] for name in ("crop_pct", "crop_mode", "interpolation") if name in facts}
        return cls(size=tuple(facts["shape"][1:]), mean=tuple(facts["mean"]), std=tuple(facts["std"]), **options)

    @classmethod
    def from_record(cls, record: Any) -> Preprocessing:
        """Build what `record` describes.

        Args:
            record: Plain data, as `record` returns it; it may come from anybody.

        Returns:
            The preprocessing.

        Raises:
            ValueError: It is no such record.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(record, Mapping) or set(record) != set(names):
            raise ValueError(f"{record!r:.200} does not describe how images are prepared: give {', '.join(names)}")
        return cls(**record)

    @property
    def record(self) -> dict[str, Any]:
        """Itself as plain data."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of what it returns."""
        return (len(self.mean), *self.size)

    def __call__(self, image: Image.Image) -> Tensor:
        """Prepare one image.

        Args:
            image: Of any size; 8 bits a channel.

        Returns:
            ``(C, H, W)`` float32.

        Raises:
            ValueError: The image has more than 8 bits a channel, which would be cut off, or is too long and narrow.
        """
        frame = Frame(self.size, len(self.mean), self.crop_pct, self.crop_mode, self.interpolation)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((frame(upright(image)).float() / 255 - mean) / std).contiguous()


def _numbers(name: str, values: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name}={values!r}: give a sequence of numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | kind):
            raise ValueError(f"{name}={values!r}: {value!r} is no {'whole ' if kind is int else ''}number")
    return tuple(kind(value) for value in values)
