import os
from pathlib import Path

import pytest
import torch

from calib_lightning.data.folders import check_counts, class_files


def _touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_labels_follow_the_given_order_and_files_are_sorted(tmp_path):
    _touch(tmp_path, "9/b.jpg", "9/a.JPEG", "10/c.jpg", "2/deep/er/d.jpg", "2/z.jpg")
    names, label = class_files(tmp_path, ["2", "9", "10"], (".jpg", ".jpeg"))
    assert names == ["2/deep/er/d.jpg", "2/z.jpg", "9/a.JPEG", "9/b.jpg", "10/c.jpg"]
    assert label.tolist() == [0, 0, 1, 1, 2]


def test_what_is_no_image_is_left_out(tmp_path):
    _touch(tmp_path, "a/1.jpg", "a/._1.jpg", "a/.hidden/2.jpg", "a/boxes.txt", "a/x.jpg/3.jpg", "b/4.jpg", "5.jpg")
    names, label = class_files(tmp_path, ["a"], [".jpg"])
    assert names == ["a/1.jpg", "a/x.jpg/3.jpg"]
    assert label.tolist() == [0, 0]


def test_classes_without_images_are_named(tmp_path):
    _touch(tmp_path, "a/1.jpg", "b/2.png", *(f"c{number}/none.txt" for number in range(9)))
    with pytest.raises(FileNotFoundError, match=r"has no images \(\.jpg\) for 2 of 3 classes: b, gone\.") as error:
        class_files(tmp_path, ["a", "b", "gone"], [".jpg"])
    assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="for 9 of 10 classes: c0, c1, c2, c3, c4 and 4 more"):
        class_files(tmp_path, ["a", *(f"c{number}" for number in range(9))], [".jpg"])


def test_every_folder_is_read_once_and_no_file_is_touched(tmp_path, monkeypatch):
    _touch(tmp_path, *(f"{label}/{number}.jpg" for label in "abc" for number in range(20)))
    read, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: read.append(Path(path).name) or scan(path))
    stats, stat = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: stats.append(path.name) or stat(path, **options))
    names, label = class_files(tmp_path, ["a", "b", "c"], [".jpg"])
    assert read == ["a", "b", "c"]
    assert not [name for name in stats if name.endswith(".jpg")]
    assert len(names) == len(label) == 60


def test_counts_that_do_not_match(tmp_path):
    check_counts(tmp_path, ["a", "b"], torch.tensor([1, 0, 0, 1]), 2)
    with pytest.raises(
        ValueError, match=r"has 1 images of the class b; it must have 2 of each class \(2 of 3 classes"
    ) as error:
        check_counts(tmp_path, ["a", "b", "c"], torch.tensor([1, 0, 0]), 2)
    assert str(tmp_path) in str(error.value)
