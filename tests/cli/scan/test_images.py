from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from lightning_mnp.cli.scan.images import (
    FoundImages,
    common_side,
    draw,
    find_classes,
    list_images,
    read_images,
)


def found_in(
    folder: Path, labels: Path | None, classes: int, class_names: Sequence[str] = ()
) -> FoundImages:
    return find_classes(list_images(folder), folder, labels, classes, class_names)


def write(folder: Path, name: str, size: tuple[int, int] = (8, 8), color: int = 0) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, 2 * color, 0)).save(path)
    return path


def test_folders_tell_the_classes_in_alphabetical_order(tmp_path: Path) -> None:
    for name in ("dog/1.png", "dog/deep/2.PNG", "cat/3.jpg", "cat/.hidden.png"):
        write(tmp_path, name)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    found = found_in(tmp_path, None, classes=2)
    assert [path.name for path in found.paths] == ["3.jpg", "1.png", "2.PNG"]
    assert (found.labels, found.class_names, found.notes) == ([0, 1, 1], ["cat", "dog"], [])


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "clean"  # what is above the folder does not matter
    for name in ("cat/0.png", "dog/1.png"):
        write(root, name)
    for name in (".ipynb_checkpoints/0-checkpoint.png", "cat/.thumbs/deep/0.png", "dog/._1.png"):
        write(root, name)
    found = found_in(root, None, classes=2)
    assert [path.name for path in found.paths] == ["0.png", "1.png"]
    assert (found.labels, found.class_names) == ([0, 1], ["cat", "dog"])


def test_names_and_numbers_of_classes(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png"):
        write(tmp_path / "names", name)
    found = found_in(tmp_path / "names", None, 3, ["dog", "owl", "cat"])
    assert found.labels == [2, 0]
    for name in ("4/1.png", "11/2.png"):
        write(tmp_path / "numbers", name)
    assert found_in(tmp_path / "numbers", None, classes=12).labels == [11, 4]


@pytest.mark.parametrize("first", [0, 1])
def test_all_numbers_of_classes_are_in_their_order(tmp_path: Path, first: int) -> None:
    for number in range(first, first + 11):
        write(tmp_path, f"{number}/{number}.png")
    found = found_in(tmp_path, None, classes=11)
    pairs = zip(found.paths, found.labels or [], strict=True)
    assert {int(path.stem): label for path, label in pairs} == {
        number: number - first for number in range(first, first + 11)
    }
    if first:
        assert found.class_names == [str(number) for number in range(1, 12)]


def test_classes_that_do_not_fit_are_told(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "val/cat/2.png"):
        write(tmp_path, name)
    message = r"Expected 10 classes.* there are 2 folders in .*: train, val, .*--labels"
    with pytest.raises(ValueError, match=message):
        found_in(tmp_path, None, classes=10)


@pytest.mark.parametrize(
    ("text", "labels", "names"),
    [
        ("a.png,2\nb.png,0\n", [2, 0], []),
        ("b.png,owl\na.png,cat\nmissing.png,dog\n", [0, 1], ["cat", "owl"]),
        ("./a.png\t1\n\nb.png\t1\n", [1, 1], []),
        ("\ufeffa.png,2\r\nb.png,0\r\n", [2, 0], []),
        ('"a.png","2"\n"b.png","0"\n', [2, 0], []),
        ('"a.png"\t"owl"\nb.png\tcat\n', [1, 0], ["cat", "owl"]),
        ('"a.png","owl, ""snow"""\nb.png,cat\n', [1, 0], ["cat", 'owl, "snow"']),
        ('"a.png";"owl"\nb.png;cat\n', [1, 0], ["cat", "owl"]),
        (".\\a.png,2\n.\\b.png,0\n", [2, 0], []),
    ],
)
def test_a_label_file_tells_the_classes(
    tmp_path: Path, text: str, labels: list[int], names: list[str]
) -> None:
    for name in ("a.png", "b.png", "unlabeled.png"):
        write(tmp_path, name)
    (tmp_path / "labels.csv").write_text(text)
    found = found_in(tmp_path, tmp_path / "labels.csv", classes=2 if names else 3)
    assert [path.name for path in found.paths] == ["a.png", "b.png"]
    assert (found.labels, found.class_names) == (labels, names)
    assert found.notes == ["1 of 3 images have no label and were left out"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"a.png,2', "every line of `--labels` to be `image,class`"),
        (f"a.png,{'2' * 200_000}", "every line of `--labels` to be `image,class`"),
        ("a.png 2", "every line of `--labels` to be `image,class`"),
        ("b.png,2", "none of the 1 names in .* is there, such as 'b.png'"),
        (None, "could not be read"),
    ],
)
def test_a_wrong_label_file_is_told(tmp_path: Path, text: str | None, message: str) -> None:
    write(tmp_path, "a.png")
    if text is not None:
        (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        found_in(tmp_path, tmp_path / "labels.csv", classes=3)


def test_names_in_a_label_file_are_found_as_they_are_first(tmp_path: Path) -> None:
    for name in ("cat/0.png", "a, b.png", "odd\\1.png"):
        write(tmp_path, name)
    (tmp_path / "labels.csv").write_text('"cat\\0.png","2"\na, b.png,1\nodd\\1.png,0\n')
    found = found_in(tmp_path, tmp_path / "labels.csv", classes=3)
    names = [path.relative_to(tmp_path).as_posix() for path in found.paths]
    assert dict(zip(names, found.labels or [], strict=True)) == {
        "cat/0.png": 2,
        "a, b.png": 1,
        "odd\\1.png": 0,
    }


def test_images_without_labels(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    found = found_in(tmp_path, None, classes=3)
    assert found.labels is None
    assert "the classes that the network predicts stand in" in found.notes[0]


def test_folders_without_images_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`--images` to be a folder with images"):
        list_images(tmp_path)
    with pytest.raises(ValueError, match="`--images` to be a folder, but got"):
        list_images(tmp_path / "missing")


def test_a_draw_takes_as_many_of_each_class_as_there_are() -> None:
    labels = [0] * 50 + [1] * 20 + [2] * 3
    found = FoundImages([Path(str(index)) for index in range(73)], labels)
    chosen = draw(found, 33, seed=0)
    assert Counter(chosen.labels) == {0: 15, 1: 15, 2: 3}
    assert [labels[int(path.name)] for path in chosen.paths] == chosen.labels
    assert chosen == draw(found, 33, seed=0) != draw(found, 33, seed=1)
    assert draw(found, 100, seed=0) == found


def test_sizes_that_all_images_have(tmp_path: Path) -> None:
    square, other = write(tmp_path, "a.png"), write(tmp_path, "b.png", (9, 9))
    wide = write(tmp_path, "c.png", (8, 9))
    assert common_side([square, square]) == 8
    assert common_side([square, other]) is None
    assert common_side([wide]) is None


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    paths = [write(tmp_path, "a.png", (8, 6), 50), write(tmp_path, "b.png", (5, 9), 100)]
    colors = read_images(paths, 4, 3)
    assert colors.shape == (2, 3, 4, 4)
    assert colors[:, :, 0, 0].tolist() == [[50, 100, 0], [100, 200, 0]]
    assert read_images(paths, 4, 1).shape == (2, 1, 4, 4)


def test_a_file_that_is_no_image_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"a\.png can't be read"):
        common_side([tmp_path / "a.png"])
    cut = write(tmp_path, "b.png", (64, 64))
    cut.write_bytes(cut.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b\.png can't be read"):
        read_images([cut], 4, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ValueError, match=r"c\.png can't be read.*exceeds limit"):
        read_images([write(tmp_path, "c.png")], 4, 3)
    with pytest.raises(ValueError, match="of 1 or 3 channels, but its first layer takes 4"):
        read_images([], 4, 4)
