"""Benchmarks whose files are downloaded, or provided by the user."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib_lightning.data.archives import extract
from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.split import SplitSpec
from calib_lightning.data.web_files import Archive, fetch, locked, md5_of


class DownloadedDataModule(BenchmarkDataModule):
    """A benchmark with files under a root folder; subclasses name the files and where to download them.

    Args:
        split: How the files are divided; ``None`` means the benchmark's `default_split`.
        root: Folder that holds, or will hold, the files.
        download: Whether to download missing files.
        augment: Whether training images are cropped (4 pixels of padding) and mirrored at random.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Attributes:
        needed: Files under the root, each with its md5, or ``None`` if it is unknown or not checked.
        archives: What to download if a file is missing.
        folder: Folder under the root for downloads.
        unpacks: Whether to unpack the archives there.
        training_files: Names of the files without which the test images can be read.
        test_only: Whether to do without these.
    """

    needed: Mapping[str, str | None]
    archives: tuple[Archive, ...]
    folder: str = ""
    unpacks: bool = False
    training_files: frozenset[str] = frozenset()
    test_only: bool = False

    def __init__(
        self,
        split: SplitSpec | None = None,
        *,
        root: str | Path = "data",
        download: bool = True,
        augment: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        self.root = Path(root).expanduser().resolve()
        self.download, self.augment = download, augment

    def prepare_data(self) -> None:
        """Check the files, those of other sets as well, and download missing ones; processes take turns.

        Raises:
            FileNotFoundError: If files are missing or damaged and were not, or could not be, downloaded.
        """
        if self.faults():
            self._fetch()
        super().prepare_data()

    @property
    def file_options(self) -> dict[str, Any]:
        """Where sets of other data look for files, if nothing else is said: beside these."""
        return {"root": self.root, "download": self.download}

    def _fetch(self) -> None:
        if not self.download:
            raise self.not_found("download=False")
        folder = self.root / self.folder
        # never replace or extend existing, incomplete files: they are the user's
        begun = {name.partition("/")[0] if self.unpacks else name for name in self.bad_files()}
        if left := sorted(name for name in begun if (self.root / name).exists()):
            raise self.not_found(f"{', '.join(left)} is incomplete or damaged: remove it to download it again")
        try:
            with locked(self.root / f"{type(self).__name__}"):
                if self.faults():
                    for archive in self._wanted_archives():
                        path = fetch(archive, folder)
                        if self.unpacks:
                            extract(path, folder)
        except (OSError, ValueError) as error:
            raise self.not_found(f"the download failed: {error}") from error
        if self.faults():
            raise self.not_found("the downloaded files are not the expected ones")

    def _wanted_archives(self) -> list[Archive]:
        return [each for each in self.archives if not (self.test_only and each.name in self.training_files)]

    def faults(self) -> list[str]:
        """One line per missing or damaged file; empty if all are intact."""
        return [f"  {name}: {fault}" for name, fault in self.bad_files().items()]

    def bad_files(self) -> dict[str, str]:
        """Needed files that are missing or damaged, and why."""
        bad = {}
        for name, expected in self.needed.items():
            if self.test_only and Path(name).name in self.training_files:
                continue
            path = self.root / name
            if not path.is_file():
                bad[name] = "missing" + (f", expected md5 {expected}" if expected else "")
            elif expected is not None and (found := md5_of(path)) != expected:
                bad[name] = f"damaged, its md5 is {found}, expected md5 {expected}"
        return bad

    def not_found(self, reason: str) -> FileNotFoundError:
        """Return an error that lists the missing files and says what to do.

        Args:
            reason: Why they were not downloaded.

        Returns:
            The error, to be raised.
        """
        lines = "\n".join(self.faults())
        verb = "unpack" if self.unpacks else "put"
        what = ", ".join(
            f"{archive.name} ({f'md5 {archive.md5}, ' if archive.md5 else ''}from {archive.url})"
            for archive in self._wanted_archives()
        )
        return FileNotFoundError(
            f"{type(self).__name__} cannot use the files under root={str(self.root)!r} ({reason}):\n{lines}\nSet "
            f"download=True, or {verb} {what} in {str(self.root / self.folder)!r}, or set root to the folder that "
            "contains these files."
        )
