"""Data as they lie around: Parquet files as blocks, and pictures by class."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import ExifTags, Image, UnidentifiedImageError
from pyarrow import parquet as pq
from ray.data.extensions.object_extension import ArrowPythonObjectType

from mnist_ray.data import sources
from mnist_ray.data.digests import digests_of
from mnist_ray.data.sources import Parquet
from mnist_ray.data.splits import splits_of
from mnist_ray.errors import JobError, UsageError
from mnist_ray.predictions.inputs import find_inputs
from mnist_ray.report.columns import read_columns
from mnist_ray.workload import Arrays, Data
from tests.conftest import folder_at, mnist


def encoded(image: np.ndarray, kind: str = "png") -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, kind)
    return content.getvalue()


IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 6, 3), dtype=np.uint8)
GREY = IMAGES[..., 0]
LABELS = np.arange(10)
HF_SHAPE = '[[8, 6], "uint8"]'


def written(file: Path, rows: int = 4, **columns: Any) -> Path:
    """Write a table with row groups of ``rows`` rows."""
    file.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(columns["table"] if "table" in columns else pa.table(columns), file, row_group_size=rows)
    return file


def arrays_of(file: Path, **options: Any) -> Arrays:
    """Return all examples of a file as arrays."""
    blocks = Parquet(file, **options)
    contents: Any = [blocks.read(number) for number in range(len(blocks.sizes))]
    return Arrays(*(np.concatenate([getattr(each, name) for each in contents]) for name in ("inputs", "targets")))


def of_ray(images: np.ndarray) -> pa.Table:
    """Return a table as Ray Data writes it."""
    about = {"ARROW:extension:name": "ray.data.arrow_tensor_v2", "ARROW:extension:metadata": "[8, 6, 3]"}
    field = pa.field("image", pa.large_list(pa.uint8()), metadata=about)
    values = pa.array(list(images.reshape(len(images), -1)), pa.large_list(pa.uint8()))
    return pa.table({"image": values, "label": LABELS}, schema=pa.schema([field, pa.field("label", pa.int64())]))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ([{"bytes": encoded(image), "path": "a.png"} for image in IMAGES], IMAGES),  # as Hugging Face writes them
        ([encoded(image) for image in GREY], GREY),
        ([encoded(image.astype(np.uint16) << 8) for image in GREY], GREY),
        ([encoded(image.astype(np.uint16) << 8, "ppm") for image in GREY], GREY),
        (GREY.tolist(), GREY),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES), IMAGES),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(GREY.transpose(0, 2, 1)), GREY.transpose(0, 2, 1)),
        (IMAGES[:, 0, 0, 0] / 255, IMAGES[:, 0, 0, 0] / 255),
    ],
)
def test_a_row_group_is_a_block_of_pictures_lists_tensors_or_numbers(
    tmp_path: Path, image: Any, expected: np.ndarray
) -> None:
    file = written(tmp_path / "some.parquet", image=image, label=LABELS)
    assert list(Parquet(file).sizes) == [4, 4, 2]
    read = arrays_of(file)
    np.testing.assert_array_equal(read.inputs, expected)
    assert read.targets.tolist() == LABELS.tolist()
    assert Parquet(file)[7][1] == 7


def test_tensors_of_ray_data_keep_their_shape(tmp_path: Path) -> None:
    np.testing.assert_array_equal(arrays_of(written(tmp_path / "some.parquet", table=of_ray(IMAGES))).inputs, IMAGES)


def test_nested_lists_of_hugging_face_keep_their_shape(tmp_path: Path) -> None:
    about = {"ARROW:extension:name": "datasets.features.features.Array2DExtensionType"}
    field = pa.field("image", pa.list_(pa.list_(pa.uint8())), metadata={**about, "ARROW:extension:metadata": HF_SHAPE})
    schema = pa.schema([field, pa.field("label", pa.int64())])
    table = pa.table({"image": pa.array(GREY.tolist(), field.type), "label": LABELS}, schema=schema)
    np.testing.assert_array_equal(arrays_of(written(tmp_path / "some.parquet", table=table)).inputs, GREY)


def test_the_index_of_pandas_is_neither_input_nor_target(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": LABELS, "price": LABELS * 2.0}).sample(frac=1, random_state=0)
    table.to_parquet(tmp_path / "some.parquet")
    read = arrays_of(tmp_path / "some.parquet")
    np.testing.assert_array_equal(read.targets, read.inputs * 2)
    decoded: Any = Parquet(tmp_path / "some.parquet", decode=lambda row: (len(row), row["price"]))
    assert decoded[0][0] == 2
    table.set_index("price").to_parquet(tmp_path / "some.parquet")
    decoded = Parquet(tmp_path / "some.parquet", decode=lambda row: (row["a"], row["price"]))
    assert decoded[0] == (table["a"].iloc[0], table["price"].iloc[0])


def test_several_columns_of_numbers_are_a_vector(tmp_path: Path) -> None:
    file = written(tmp_path / "some.parquet", a=LABELS, b=LABELS * 0.5, name=["x"] * 10, label=LABELS % 2 == 0)
    read = arrays_of(file, columns=["b", "a", "label"])
    np.testing.assert_array_equal(read.inputs, np.stack([LABELS * 0.5, LABELS], axis=1).astype(np.float32))
    assert read.targets.dtype == bool


def test_decode_makes_examples_of_rows(tmp_path: Path) -> None:
    file = written(tmp_path / "some.parquet", text=["a", "bb", None, "c"], label=[1, 2, 3, 4])
    blocks: Any = Parquet(file, columns=["text", "label"], decode=lambda row: (len(row["text"] or ""), row["label"]))
    assert list(blocks.read(0)) == [(1, 1), (2, 2), (0, 3), (1, 4)]


@pytest.mark.parametrize(
    ("place", "sizes"),
    [
        ("data", [4, 4, 2, 4, 4, 2, 4, 4, 2]),
        ("data/train-*.parquet", [4, 4, 2, 4, 4, 2]),
        ("data/*/c.parquet", [4, 4, 2]),
        ("data/train-b.parquet", [4, 4, 2]),
        ("data/tr*-b*", [4, 4, 2]),
    ],
)
@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_place_is_a_file_a_folder_or_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, sizes: list[int], is_absolute: bool
) -> None:
    for name in ("train-a", "train-b", "more/c"):
        written(tmp_path / "data" / f"{name}.parquet", image=LABELS, label=LABELS)
    (tmp_path / "data" / "notes.txt").write_text("not Parquet")
    monkeypatch.chdir(tmp_path)
    assert list(Parquet(f"{tmp_path}/{place}" if is_absolute else place).sizes) == sizes


def test_links_to_folders_lead_to_each_file_once(tmp_path: Path) -> None:
    for number, place in enumerate(("in/a.parquet", "in/more/b.parquet", "elsewhere/c.parquet")):
        written(tmp_path / place, x=[number], y=[number])
    for name, target in (("again", "in"), ("back", "in/more"), ("linked", "elsewhere")):
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    assert sorted(arrays_of(tmp_path / "in").targets) == [0, 1, 2]


def test_what_spark_has_not_finished_is_passed_over(tmp_path: Path) -> None:
    for number, place in enumerate(("a.parquet", "_temporary/0/b.parquet", "_c.parquet", ".d/e.parquet")):
        written(tmp_path / place, x=[number], y=[number])
    assert [*arrays_of(tmp_path).targets] == [0]


def test_a_pattern_may_be_in_a_folder_with_brackets(tmp_path: Path) -> None:
    written(tmp_path / "x[1]" / "a[2]-b.parquet", image=LABELS, label=LABELS)
    assert list(Parquet(f"{tmp_path}/x[1]/a[2]-*.parquet").sizes) == [4, 4, 2]


def test_empty_files_and_row_groups_are_passed_over(tmp_path: Path) -> None:
    written(tmp_path / "a.parquet", image=LABELS[:0], label=LABELS[:0])
    with pq.ParquetWriter(tmp_path / "b.parquet", pa.schema({"image": pa.int64(), "label": pa.int64()})) as writer:
        for part in (LABELS[:3], LABELS[:0], LABELS[3:]):
            writer.write_table(pa.table({"image": part, "label": part}))
    assert list(Parquet(tmp_path).sizes) == [3, 7]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda file: written(file, a=LABELS, b=LABELS), {"columns": ["a", "c"]}, "has no column c, only a, b$"),
        (lambda file: written(file, a=LABELS), {}, "name at least two columns, those of the inputs, then that of"),
        (lambda file: file.write_text("not a table"), {}, "is not a whole Parquet file: Parquet magic bytes"),
        (
            lambda file: file.write_bytes(written(file, a=LABELS, b=LABELS).read_bytes()[:-20]),
            {},
            "is not a whole Parquet file: ",
        ),
        (lambda file: None, {}, "has no Parquet files$"),
    ],
)
def test_files_that_cannot_be_used_are_refused_at_the_start(
    tmp_path: Path, make: Callable[[Path], object], options: Any, message: str
) -> None:
    make(tmp_path / "some.parquet")
    with pytest.raises((UsageError, JobError), match=message):
        Parquet(tmp_path, **options)


def fails(row: dict[str, Any]) -> Any:
    raise ValueError(f"no label {row['label']}")


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ([encoded(GREY[0]), b"no picture"], {}, ", row 1: UnidentifiedImageError: cannot identify image file"),
        (
            [encoded(GREY[0]), encoded(GREY[0].T)],
            {},
            "column image has pictures of different sizes; pass decode=",
        ),
        (
            [[1, 2], [3]],
            {},
            "column image has lists of different lengths; pass decode=, which turns a row into an example$",
        ),
        ([1, None], {}, "column image has nulls; pass decode="),
        ([[1, 2], [3, None]], {}, "column image has nulls in its lists; pass decode="),
        (["a", "b"], {}, "column image holds string, not numbers; pass"),
        ([[1], [2]], {"columns": ["image", "label", "label"]}, "several columns of inputs must hold a number each"),
        ([encoded(GREY[0], "EPS")] * 2, {}, ", row 0: UnidentifiedImageError: cannot identify image file"),
        ([{"a": 1}] * 2, {}, "column image holds struct<a: int64>, not numbers; pass decode="),
        (
            pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())),
            {},
            r"column image holds map<.*>, not numbers; pass",
        ),
        ([1, 2], {"decode": fails}, ", row 0: ValueError: no label 0$"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, image: Any, options: Any, message: str) -> None:
    file = written(tmp_path / "some.parquet", image=image, label=LABELS[:2])
    with pytest.raises(UsageError, match=f"^{file}, row group 0.*{message}"):
        Parquet(file, **options).read(0)


@pytest.mark.parametrize("metadata", [b"{not json", b"[7, 7]", b"5"])
def test_a_column_whose_metadata_are_damaged_is_named(metadata: bytes, tmp_path: Path) -> None:
    field = pa.field("image", pa.list_(pa.float64()), metadata={b"ARROW:extension:metadata": metadata})
    table = pa.table([[[1.0, 2.0]] * 2, LABELS[:2]], pa.schema([field, pa.field("label", pa.int64())]))
    pq.write_table(table, tmp_path / "some.parquet")
    with pytest.raises(UsageError, match=r"row group 0, column image cannot be read: .*; pass decode="):
        Parquet(tmp_path).read(0)


@pytest.mark.parametrize("metadata", [b"{not json", b'{"index_columns": 5}', b"[]"])
def test_damaged_metadata_of_pandas_do_not_matter(metadata: bytes, tmp_path: Path) -> None:
    table = pa.table({"image": [1.0, 2.0], "label": LABELS[:2]}).replace_schema_metadata({b"pandas": metadata})
    pq.write_table(table, tmp_path / "some.parquet")
    assert arrays_of(tmp_path).targets.tolist() == [0, 1]


def test_a_pickled_object_in_a_table_is_never_loaded(tmp_path: Path) -> None:
    class Touches:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "it_ran",)

    values = pa.ExtensionArray.from_storage(
        ArrowPythonObjectType(), pa.array([pickle.dumps(Touches())], pa.large_binary())
    )
    nested = pa.StructArray.from_arrays([values], names=["deep"])
    lists = pa.ListArray.from_arrays([0, 1], values)
    for name, column in (("plain", values), ("nested", nested), ("lists", lists)):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"image": [b"1"], "y": column}), tmp_path / name / "predictions.parquet")
        with pytest.raises(UsageError, match="column y holds pickled objects, which could run any code"):
            sources.Parquet(tmp_path / name, decode=lambda row: (row["image"], 0))
        with pytest.raises(JobError, match=r"predictions\.parquet is damaged: column y holds pickled objects"):
            read_columns(folder_at(tmp_path / name))
        with pytest.raises(UsageError, match=r"none of the Parquet files in .* can be read"):
            find_inputs(str(tmp_path / name), mnist(), ("image",))
    assert not (tmp_path / "it_ran").exists()


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([LABELS, LABELS, LABELS], ["a", "b", "a"]), tmp_path / "some.parquet")
    with pytest.raises(UsageError, match=r"some\.parquet has several columns a: rename all but one$"):
        Parquet(tmp_path)
    assert len(Parquet(tmp_path, columns=["b", "b"])) == len(LABELS)


def test_a_damaged_row_group_is_named_and_not_taken_for_a_failing_storage(tmp_path: Path) -> None:
    file = written(tmp_path / "some.parquet", image=LABELS * 1000, label=LABELS)
    content = bytearray(file.read_bytes())
    content[4:60] = bytes(56)
    file.write_bytes(content)
    blocks = Parquet(file)
    with pytest.raises(JobError, match=f"^{file}, row group 0 is damaged: "):
        blocks.read(0)
    assert len(blocks.read(1)) == 4


def test_a_file_that_has_changed_is_not_read(tmp_path: Path) -> None:
    file = written(tmp_path / "some.parquet", image=LABELS, label=LABELS)
    blocks = Parquet(file)
    os.utime(file, (1, 1))
    with pytest.raises(UsageError, match=f"^{file} has changed since the data were loaded$"):
        blocks.read(0)
    before = blocks.identity
    assert Parquet(file).identity != before


def test_the_data_are_recognized_by_their_files(tmp_path: Path) -> None:
    def digest() -> Any:
        splits = splits_of(Data(Parquet(tmp_path), Parquet(tmp_path)), 4)
        return digests_of(splits)["training"]

    file = written(tmp_path / "some.parquet", image=LABELS, label=LABELS)
    first = digest()
    assert first == digest() is not None
    os.utime(file, (1, 1))
    assert digest() != first


def test_data_in_another_folder_are_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / "old" / name / "some.parquet", image=LABELS, label=LABELS)
    before = Parquet(tmp_path / "old").identity
    assert Parquet((tmp_path / "old").rename(tmp_path / "new")).identity == before


def test_a_block_is_named_by_its_file_and_row_group(tmp_path: Path) -> None:
    files = [written(tmp_path / name, image=LABELS, label=LABELS) for name in ("a.parquet", "b.parquet")]
    assert Parquet(tmp_path).block_names[2:4] == [f"{files[0]}, row group 2", f"{files[1]}, row group 0"]


# --- pictures by class


COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def write_pictures(folder: Path, number: int, names: tuple[str, ...] = ("blue", "red")) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(number):
            Image.new("RGB", (40, 30), COLOURS.get(name, (9, 9, 9))).save(folder / name / f"{index}.png")


@pytest.mark.parametrize("other", ["test", "val"])
def test_pictures_are_read_by_class_from_two_folders(tmp_path: Path, other: str) -> None:
    write_pictures(tmp_path / "train", 3)
    write_pictures(tmp_path / other, 1)
    data = sources.pictures(tmp_path, size=8)
    assert data.metadata == {"class_names": ["blue", "red"]}
    assert (len(data.train), len(data.files)) == (6, 8)  # type: ignore[arg-type]
    splits = splits_of(data, None)
    assert (len(splits.test), splits.evaluated) == (2, other)
    for number, colour in enumerate(COLOURS.values()):
        pixels, target = splits.test[number]
        assert target == number
        np.testing.assert_array_equal(pixels, np.broadcast_to(np.array(colour)[:, None, None], (3, 8, 8)))


def test_pictures_in_three_folders_are_for_training_test_and_validation(tmp_path: Path) -> None:
    for number, name in enumerate(("test", "train", "val"), 1):
        write_pictures(tmp_path / name, number)
    splits = splits_of(sources.pictures(tmp_path, size=8), validation_size=None)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (4, 6, 2)
    write_pictures(tmp_path / "val", 1, names=("green",))
    with pytest.raises(UsageError, match=r"train/ and val/ differ in classes$"):
        sources.pictures(tmp_path)


def test_of_pictures_in_one_folder_a_fifth_is_the_test_and_grey_has_one_channel(tmp_path: Path) -> None:
    write_pictures(tmp_path / "all", 10)
    data = sources.pictures(tmp_path / "all", size=16, is_grey=True)
    assert (len(data.train), len(data.test)) == (16, 4)  # type: ignore[arg-type]
    assert splits_of(data, 0).train[0][0].shape == (1, 16, 16)
    assert data.train.targets == [data.train[index][1] for index in range(16)]  # type: ignore[union-attr, index]


def test_hidden_files_and_folders_are_neither_classes_nor_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path / ".data", 3)
    write_pictures(tmp_path / ".data", 1, names=(".ipynb_checkpoints", "red/.ipynb_checkpoints"))
    data = sources.pictures(tmp_path / ".data")
    assert data.metadata == {"class_names": ["blue", "red"]}
    assert len(data.files) == 2 * 3
    shutil.rmtree(tmp_path / ".data" / "blue")
    shutil.rmtree(tmp_path / ".data" / "red")
    with pytest.raises(UsageError, match=r"has no folder with images, one for each class$"):
        sources.pictures(tmp_path / ".data")


def test_pictures_with_16_bits_keep_their_greys(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(np.full((8, 8), 100 << 8, np.uint16)).save(tmp_path / name / f"{number}.png")
    assert splits_of(sources.pictures(tmp_path, size=8), 0).train[0][0].unique().tolist() == [100]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(mode: str, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 4))
    picture = picture.quantize(8) if mode == "P" else picture.convert(mode)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "0.png")
    pixels, _ = splits_of(sources.pictures(tmp_path, size=4), 0).train[0]
    assert pixels.tolist() == [[[0, 0, 255, 255]] * 4] * 3
    content = (tmp_path / "a" / "0.png").read_bytes()
    (kept,) = arrays_of(written(tmp_path / "some.parquet", image=[content], label=[0])).inputs
    assert kept.tolist() == [[0] * 4 + [255] * 4 if mode == "LA" else [[0] * 3] * 4 + [[255] * 3] * 4] * 4


@pytest.mark.parametrize("mode", ["I", "F"])
def test_greys_of_32_bits_are_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (4, 4), 3).save(tmp_path / "a.tif")
    with pytest.raises(UsageError, match="a grey of 32 bits, whose white is unknown; save it with 8 or 16 bits"):
        sources.open_picture(tmp_path / "a.tif")


def test_a_picture_in_another_format_is_not_opened(tmp_path: Path) -> None:
    for name in ("ants", "bees"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(encoded(GREY[0], "EPS"))  # Pillow would start Ghostscript
    data = sources.pictures(tmp_path)
    with pytest.raises(UnidentifiedImageError):
        data.train[0]  # type: ignore[index]


def test_photos_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned a quarter to the left
    lying = Image.fromarray(np.kron([[0, 255], [0, 255]], np.ones((8, 8))).astype(np.uint8))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lying.save(tmp_path / name / "0.jpg", exif=exif)
    content = (tmp_path / "a" / "0.jpg").read_bytes()
    (upright,) = arrays_of(written(tmp_path / "some.parquet", image=[content], label=[0])).inputs
    assert (upright[4, 4], upright[12, 4]) == (0, 255)
    pixels, _ = splits_of(sources.pictures(tmp_path, size=16, is_grey=True), 0).train[0]
    np.testing.assert_array_equal(pixels[0], upright)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "has no folder with images, one for each class$"),
        ({"test": ("red",), "val": ("red",), "training": ("red",)}, "has test/ and val/; it needs train/"),
        ({"train": ("red",), "test": ("green",)}, "train/ and test/ differ in classes"),
        ({"train": ("red",), "test/red": ()}, "test/red has no images$"),
    ],
)
def test_folders_that_hold_no_pictures_by_class_are_refused(
    parts: dict[str, tuple[str, ...]], message: str, tmp_path: Path
) -> None:
    for part, names in parts.items():
        (tmp_path / part).mkdir(parents=True)
        write_pictures(tmp_path / part, 1, names)
    with pytest.raises(UsageError, match=message):
        sources.pictures(tmp_path)


class Rows(list):  # type: ignore[type-arg]
    """Dicts with what a ``datasets.Dataset`` knows of its columns."""

    column_names = ("image", "mask", "label")
    _fingerprint = "1234"
    features = {"label": SimpleNamespace(names=["cat", "dog"])}


ROWS = [{"image": number, "mask": -number, "label": number % 2} for number in range(3)]


def test_items_that_are_dicts_become_pairs_and_several_keys_a_dict() -> None:
    found = sources.huggingface(Rows(ROWS), "image", "label")
    assert [found[index] for index in range(len(found))] == [(0, 0), (1, 1), (2, 0)]
    assert found.classes == ["cat", "dog"]
    both = sources.huggingface(ROWS, ["image", "mask"], "label")
    assert (both[2], hasattr(both, "classes")) == (({"image": 2, "mask": -2}, 0), False)
    digest = [digests_of(splits_of(Data(data, data), 0))["training"] for data in (found, found, both)]
    assert digest[0] == digest[1] != digest[2] is None
    with pytest.raises(UsageError, match=r"^the data set has no column img, only image, mask, label$"):
        sources.huggingface(Rows(ROWS), "img", "label")


def test_a_stream_of_dicts_stays_a_stream() -> None:
    stream = sources.huggingface(lambda: iter(ROWS), "image", "label")
    assert stream.first(9) == [(0, 0), (1, 1), (2, 0)]
