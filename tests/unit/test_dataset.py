"""A dataset from a folder or a batch: captions, tables, companions, what is left out and what is held out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import captions, contact_sheet, dataset, sources
from longcat_pack.longcat_backend.training.dataset import Dataset, DatasetSettings

Read = Callable[..., Dataset]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What may be read; the dataset's folder is ``pictures`` in it."""
    (tmp_path / "input" / "pictures").mkdir(parents=True)
    return tmp_path / "input"


@pytest.fixture
def folder(root: Path) -> Path:
    return root / "pictures"


@pytest.fixture
def read(root: Path) -> Read:
    """The folder's dataset at 64 x 64 and its ratios, with settings changed."""

    def call(**settings: Any) -> Dataset:
        values = {"folder": "pictures", "resolutions": "64", "grid": 16, **settings}
        return dataset.read_folder(DatasetSettings(**values), [root])

    return call


def add(folder: Path, name: str, caption: str | None = "a caption", colour: Any = "red", size: Any = (64, 64)) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def kinds(made: Dataset) -> dict[str, set[str]]:
    """The kinds of problems by name."""
    found: dict[str, set[str]] = {}
    for problem in made.problems:
        found.setdefault(problem.name, set()).add(problem.kind)
    return found


def captions_of(made: Dataset) -> dict[str, str]:
    return {item.name: item.caption for item in made.items}


def test_captions_beside_the_pictures(folder: Path, read: Read) -> None:
    add(folder, "a.png", "  一只猫\n")
    add(folder, "deep/er/b.JPG", "\ufeffwith a mark of its encoding", "blue")
    add(folder, "c.webp", None, "green")
    (folder / "c.json").write_text(json.dumps({"prompt": "from JSON"}), encoding="utf-8")
    add(folder, ".hidden/d.png")
    (folder / "notes.md").write_text("not a picture", encoding="utf-8")
    made = read()
    assert captions_of(made) == {
        "a.png": "一只猫",
        "c.webp": "from JSON",
        "deep/er/b.JPG": "with a mark of its encoding",
    }
    assert not made.problems and not made.edits


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_one_table_for_all(kind: str, folder: Path, read: Read) -> None:
    add(folder, "a.png", "not this one")
    add(folder, "sub/b.png", None, "blue")
    add(folder, "c.png", "from the file beside it", "green")
    rows = [{"file_name": "a.png", "caption": "from, the table"}, {"file_name": "sub/b.png", "caption": "二"}]
    texts = {
        "jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "json": json.dumps(rows),
        "csv": '\ufefffile_name,caption\na.png,"from, the table"\nsub/b.png,二\n',
    }
    (folder / f"metadata.{kind}").write_text(texts[kind], encoding="utf-8")
    assert captions_of(read()) == {"a.png": "from, the table", "sub/b.png": "二", "c.png": "from the file beside it"}


def test_the_official_table_of_pairs_is_read(folder: Path, read: Read) -> None:
    add(folder, "after.png", None)
    add(folder, "before.png", None, "blue")
    row = {"img_path": "after.png", "ref_img_path": "before.png", "prompt": "make it red", "width": 64, "height": 64}
    (folder / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    made = read()
    assert captions_of(made) == {"after.png": "make it red"}
    reference = made.items[0].reference_pixels()
    width, height = made.items[0].size
    assert made.edits and made.largest_size == (2 * width, height) and reference is not None
    assert reference[0, :, 0, 0].tolist() == [-1, -1, 1]


def test_a_table_written_on_windows_is_read(folder: Path, read: Read) -> None:
    add(folder, "sub/a.png", None)
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,text\r\nsub\\a.png,one\r\n")
    assert captions_of(read()) == {"sub/a.png": "one"}


def test_a_name_in_another_encoding_can_be_shown(folder: Path, read: Read) -> None:
    path = folder / os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (64, 64)).save(path)
    path.with_suffix(".txt").write_text("a caption", encoding="utf-8")
    made = read()
    assert captions_of(made) == {"caf\\udce9.png": "a caption"}
    assert f"{made.report()}{contact_sheet.legend(made)}".encode()


def test_a_picture_may_have_several_captions_in_a_table(folder: Path, read: Read) -> None:
    add(folder, "a.png", None)
    rows = [{"file": "a.png", "text": text} for text in ("one", "two")]
    (folder / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")
    assert [item.caption for item in read().items] == ["one", "two"]


def test_bad_lines_are_named_by_their_numbers_and_the_others_count(folder: Path, read: Read) -> None:
    add(folder, "a.png", None)
    lines = [
        b'{"file_name": "a.png", "caption": "good"}',
        b'{"file_name": "a.png", "caption": ',
        b'{"caption": "no file"}',
        b'{"file_name": "gone.png", "caption": "x"}',
        b'"only text"',
        '{"file_name": "a.png", "caption": "café"}'.encode("latin-1"),
        b'{"file_name": "a.png", "caption": 7}',
        b'{"file_name": "../../etc/passwd", "caption": "x"}',
        b'{"file_name": "a.png", "caption": "half \\ud83d"}',
        b"[" * 100_000,
    ]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    made = read()
    assert captions_of(made) == {"a.png": "good"}
    expected = dict.fromkeys((2, 3, 5, 6, 7, 9, 10), "bad line") | {4: "no file", 8: "outside"}
    assert kinds(made) == {f"metadata.jsonl:{line}": {kind} for line, kind in expected.items()}
    assert "SKIPPED 已跳过: metadata.jsonl:2 is a line that cannot be read 该行无法读取 (no JSON" in made.report()


def test_a_csv_caption_with_a_comma_and_no_quotes_is_named_and_not_cut(folder: Path, read: Read) -> None:
    for name in ("a.png", "b.png"):
        add(folder, name, None)
    lines = ["file_name,caption", 'b.png,"a dog, lying"', "a.png,a red cat, sitting"]
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    made = read()
    assert captions_of(made) == {"b.png": "a dog, lying"}
    assert kinds(made)["metadata.csv:3"] == {"bad line"}
    assert "more fields (3) than columns (2), put captions with commas in quotes" in made.report()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("metadata.json", b"[{]", "no JSON in UTF-8"),
        ("metadata.json", b'{"a.png": "x"}', "not a list"),
        ("metadata.csv", b"name;text\na.png;x\n", "its first line names none of: file_name"),
        ("metadata.csv", b"file_name,caption\na.png,\xe9\n", "not UTF-8"),
        ("metadata.csv", b'file_name,caption\na.png,"open\n', "line"),
        ("metadata.csv", b"", "its first line names none of"),
    ],
)
def test_a_table_that_cannot_be_read_stops_the_run(
    name: str, data: bytes, words: str, folder: Path, read: Read
) -> None:
    add(folder, "a.png")
    (folder / name).write_bytes(data)
    with pytest.raises(LongCatError, match=words):
        read()


def test_two_tables_stop_the_run(folder: Path, read: Read) -> None:
    add(folder, "a.png")
    for name in ("metadata.csv", "metadata.jsonl"):
        (folder / name).write_text("", encoding="utf-8")
    with pytest.raises(LongCatError, match=r"several tables \(metadata.jsonl, metadata.csv\)"):
        read()


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata-2.csv", "dataset.json", "captions.tsv", "train.parquet"])
def test_a_table_under_a_name_that_is_not_read_is_named_first(name: str, folder: Path, read: Read) -> None:
    for index in range(12):
        add(folder, f"{index}.png", None, (index, 0, 0))
    add(folder, "0.png", None).with_suffix(".json").write_text('{"caption": "its own"}', encoding="utf-8")
    (folder / name).write_text("", encoding="utf-8")
    told = f"{name} is not read: a table of captions has one of these names"
    made = read()
    assert captions_of(made) == {"0.png": "its own"}
    assert kinds(made)[name] == {"other table"} and "metadata.jsonl, metadata.json, metadata.csv" in made.report()
    assert made.report().index(told) < made.report().index("1.png")
    (folder / "0.json").unlink()
    with pytest.raises(LongCatError, match=told):
        read()


def test_what_cannot_be_used_is_left_out_and_named_and_the_rest_is_trained(folder: Path, read: Read) -> None:
    add(folder, "good.png")
    (add(folder, "broken.png")).write_bytes(b"no picture")
    add(folder, "dot.png", size=(1, 1))
    add(folder, "stripe.png", size=(20_000, 20))
    add(folder, "missing.png", None)
    add(folder, "empty.png", " \n")
    add(folder, "latin.png").with_suffix(".txt").write_bytes("café".encode("latin-1"))
    add(folder, "list.png", None).with_suffix(".json").write_text("[1]", encoding="utf-8")
    add(folder, "fieldless.png", None).with_suffix(".json").write_text('{"tags": "x"}', encoding="utf-8")
    add(folder, "novel.png", "x" * (captions.LARGEST_CAPTION + 1))
    made = read()
    assert captions_of(made) == {"good.png": "a caption"}
    assert kinds(made) == {
        "broken.png": {"unreadable"},
        "dot.png": {"too small"},
        "stripe.png": {"too long"},
        "missing.png": {"no caption"},
        "empty.png": {"no caption"},
        "latin.png": {"bad caption"},
        "list.png": {"bad caption"},
        "fieldless.png": {"bad caption"},
        "novel.png": {"bad caption"},
    }
    assert all(problem.skipped for problem in made.problems)
    assert "save it as UTF-8" in made.report() and "skipped 已跳过: 9" in made.report()


def test_what_can_be_used_with_care_is_trained_and_named(folder: Path, read: Read) -> None:
    add(folder, "a.png")
    add(folder, "small.png", colour="blue", size=(32, 32))
    add(folder, "wide.png", colour="green", size=(400, 100))
    add(folder, "twin.png", "another caption")
    add(folder, "sign.png", "a shop sign that says OPEN", "white")
    add(folder, "title.png", "海报《春天》", "black")
    Image.new("RGBA", (64, 64), (1, 2, 3, 0)).save(add(folder, "clear.png"))
    made = read()
    assert len(made.items) == 7
    assert kinds(made) == {
        "small.png": {"enlarged"},
        "wide.png": {"cropped"},
        "twin.png": {"duplicate"},
        "sign.png": {"not quoted"},
        "title.png": {"foreign quotes"},
        "clear.png": {"transparent"},
    }
    assert "twin.png is the same picture as 与此图像相同： (a.png)" in made.report()
    assert "(OPEN)" in made.report() and "(《春天》)" in made.report()


def test_files_of_every_kind_are_trained_side_by_side(folder: Path, read: Read) -> None:
    add(folder, "plain.jpg")
    Image.new("RGBA", (64, 64), (0, 0, 255, 128)).save(add(folder, "alpha.png"))
    Image.new("L", (64, 64), 90).save(add(folder, "grey.png"))
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(add(folder, "deep.png"))
    frames = [Image.new("RGB", (64, 64), (0, 80 * index, 99)) for index in range(3)]
    frames[0].save(add(folder, "moving.gif"), save_all=True, append_images=frames[1:])
    frames[0].save(add(folder, "moving.webp"), save_all=True, append_images=frames[1:])
    made = read()
    assert len(made.items) == 6
    assert all(item.pixels().shape == (1, 3, 64, 64) for item in made.items)
    assert kinds(made) == {
        "alpha.png": {"transparent"},
        "grey.png": {"grey"},
        "deep.png": {"16 bit", "grey"},
        "moving.gif": {"animated"},
        "moving.webp": {"animated"},
    }


def test_a_report_of_many_problems_ends_somewhere(folder: Path, read: Read) -> None:
    add(folder, "good.png")
    lines = ["no JSON"] * 1000
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    report = read().report()
    assert report.count("\n") < 210 and report.endswith("… and 800 more 还有 800 项")


def test_a_long_caption_is_noticed_where_tokens_can_be_counted(folder: Path, root: Path) -> None:
    add(folder, "a.png", "word " * 513)
    add(folder, "b.png", "word " * 512, "blue")
    settings = DatasetSettings(folder="pictures", resolutions="64", grid=16)
    made = dataset.read_folder(settings, [root], lambda caption: len(caption.split()))
    assert kinds(made) == {"a.png": {"cut"}}


@pytest.mark.parametrize("broken", [False, True], ids=["nothing there", "all of it broken"])
def test_a_folder_without_a_picture_that_can_be_used_stops_the_run(broken: bool, folder: Path, read: Read) -> None:
    (folder / "readme.txt").write_text("no picture here", encoding="utf-8")
    if broken:
        (folder / "a.png").write_bytes(b"")
    with pytest.raises(LongCatError) as caught:
        read(trigger_word="zorb")
    expected = "SKIPPED 已跳过: a.png cannot be read" if broken else "There is no picture in 'pictures'"
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a picture of {trigger}, red", "a picture of zorb, red"),
        ("a red star", "zorb, a red star"),
        ("a red zorb", "a red zorb"),
        ("红色的zorb星", "红色的zorb星"),
        ("azorbed", "zorb, azorbed"),
        ("一颗红色的星", "zorb，一颗红色的星"),
        ("", "zorb"),
    ],
)
def test_the_trigger_word(caption: str, expected: str, folder: Path, read: Read) -> None:
    add(folder, "a.png", caption)
    made = read(trigger_word=" zorb ")
    assert captions_of(made) == {"a.png": expected}
    assert kinds(made) == ({} if caption else {"a.png": {"only trigger"}})


def test_a_place_for_a_trigger_word_that_is_not_set_stops_the_run(folder: Path, read: Read) -> None:
    add(folder, "a.png", "a {trigger}")
    with pytest.raises(LongCatError, match="none is set: “a {trigger}”"):
        read()


def test_masks_and_references_of_the_same_names(folder: Path, read: Read) -> None:
    add(folder, "one.png", size=(128, 128))
    add(folder, "sub/two.png", colour="blue")
    add(folder, "references/one.jpg", None, "black", (128, 128))
    add(folder, "references/sub/two.webp", None, "white")
    add(folder, "masks/sub/two.png", None, "black")
    made = read()
    assert [item.name for item in made.items] == ["one.png", "sub/two.png"] and made.edits
    one, two = made.items
    assert one.mask is None and two.mask is not None
    assert torch.all(two.mask.weights(two.size) == 0.05)
    assert one.reference_pixels().max() == -1 and two.reference_pixels().min() == 1  # type: ignore[union-attr]
    assert "edit pairs 编辑图像对: 2" in made.report()


def test_a_pair_without_its_half_or_with_a_broken_one_is_left_out(folder: Path, root: Path, read: Read) -> None:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green"), ("d", "white")):
        add(folder, f"{name}.png", colour=colour)
    before = root / "before"
    add(before, "a.png", None)
    (add(before, "c.png", None)).write_bytes(b"")
    add(before, "d.png", None, size=(128, 64))
    made = read(reference_folder="before")
    assert [item.name for item in made.items] == ["a.png", "d.png"]
    assert kinds(made) == {"b.png": {"no reference"}, "c.png": {"bad reference"}, "d.png": {"other ratio"}}


def test_one_folder_is_not_both_halves_of_the_pairs(folder: Path, read: Read) -> None:
    add(folder, "a.png")
    with pytest.raises(LongCatError, match="both 'pictures'"):
        read(reference_folder="pictures")


def test_a_mask_of_another_ratio_is_left_out(folder: Path, read: Read) -> None:
    add(folder, "a.png")
    add(folder, "b.png", colour="blue")
    add(folder, "masks/b.png", None, size=(100, 64))
    assert kinds(read()) == {"b.png": {"bad mask"}}


def test_held_out_pictures_depend_on_content_alone(folder: Path, root: Path, read: Read) -> None:
    for index in range(10):
        add(folder, f"{index}.png", colour=(index, 0, 0))
    made = read(held_out=0.3, repeats=2)
    digests = {made.items[index].picture.digest for index in made.held_out}
    assert len(made.held_out) == 3
    trained = [index for indices in made.buckets().values() for index in indices]
    assert not set(trained) & set(made.held_out) and sorted(trained) == sorted(
        2 * list(set(range(10)) - set(made.held_out))
    )
    for path in sorted(folder.iterdir()):
        path.rename(path.with_name(f"{9 - int(path.stem)}{path.suffix}.tmp"))
    for path in sorted(folder.iterdir()):
        path.rename(path.with_suffix(""))
    again = read(held_out=0.3)
    assert {again.items[index].picture.digest for index in again.held_out} == digests


@pytest.mark.parametrize(("pictures", "share", "expected"), [(3, 0.5, 0), (4, 0.01, 1), (4, 0.5, 2), (9, 0.0, 0)])
def test_how_many_are_held_out(pictures: int, share: float, expected: int, folder: Path, read: Read) -> None:
    for index in range(pictures):
        add(folder, f"{index}.png", colour=(index, 0, 0))
    made = read(held_out=share)
    assert len(made.held_out) == expected
    assert ("nothing is held out" in made.report()) == (share > 0 and expected == 0)


def test_the_identity_is_the_content_and_not_the_names(folder: Path, read: Read) -> None:
    path = add(folder, "a.png")
    first = read().identity()
    path.rename(folder / "b.png")
    (folder / "a.txt").rename(folder / "b.txt")
    assert read().identity() == first
    identities = {
        first,
        read(resolutions="128").identity(),
        read(repeats=2).identity(),
        read(caption_dropout=0.2).identity(),
    }
    (folder / "b.txt").write_text("another", encoding="utf-8")
    identities.add(read().identity())
    add(folder, "b.png", colour="blue")
    identities.add(read().identity())
    assert len(identities) == 6


def test_a_fingerprint_changes_with_names_sizes_and_times(folder: Path) -> None:
    path = add(folder, "a.png")
    seen = {sources.fingerprint([folder])}
    assert sources.fingerprint([folder]) in seen
    path.with_suffix(".txt").write_text("longer than before", encoding="utf-8")
    seen.add(sources.fingerprint([folder]))
    path.rename(folder / "b.png")
    seen.add(sources.fingerprint([folder]))
    (folder / "c.txt").touch()
    seen.add(sources.fingerprint([folder]))
    assert len(seen) == 4


def test_folders_outside_the_roots_are_refused_in_the_same_words_whether_they_are_there(root: Path) -> None:
    (root.parent / "there").mkdir()
    said = []
    for name in ("../there", "../not_there", str(root.parent / "there"), str(root.parent / "not_there"), "", "\0"):
        with pytest.raises(LongCatError) as caught:
            sources.resolve_folder(name, [root])
        said.append(str(caught.value).replace(name, "NAME") if name else str(caught.value))
    assert len(set(said[:4])) == 1 and "Found there: pictures." in said[0]
    assert sources.resolve_folder(str(root / "pictures"), [root]) == (root / "pictures").resolve()
    assert sources.resolve_folder("there", [root, root.parent]) == (root.parent / "there").resolve()


def test_links_that_lead_out_are_not_followed(root: Path, folder: Path, read: Read) -> None:
    secret = add(root.parent / "secret", "a.png")
    add(folder, "good.png", colour="blue")
    (folder / "link.png").symlink_to(secret)
    (folder / "all").symlink_to(secret.parent, target_is_directory=True)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "link.txt").write_text("a link", encoding="utf-8")
    made = read()
    assert captions_of(made) == {"good.png": "a caption"}
    assert kinds(made)["link.png"] == {"outside"}
    (root / "linked").symlink_to(secret.parent, target_is_directory=True)
    with pytest.raises(LongCatError, match="There is no folder 'linked'"):
        sources.resolve_folder("linked", [root])


def test_a_caption_is_not_read_through_a_link_that_leads_out(root: Path, folder: Path, read: Read) -> None:
    secret = root.parent / "secret.txt"
    secret.write_text("the owner's secret", encoding="utf-8")
    add(folder, "good.png", colour="blue")
    add(folder, "a.png", None).with_suffix(".txt").symlink_to(secret)
    made = read()
    assert captions_of(made) == {"good.png": "a caption"} and kinds(made)["a.png"] == {"outside"}
    (folder / "metadata.csv").symlink_to(secret)
    with pytest.raises(LongCatError, match="'metadata.csv' is a link to a place outside"):
        read()


def test_settings_go_to_json_and_back() -> None:
    settings = DatasetSettings(folder="a", resolutions="512", grid=16, repeats=3, trigger_word="佐布", held_out=0.1)
    assert DatasetSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(LongCatError, match="no setting 'reps'"):
        DatasetSettings.from_json({"reps": 1})
    for values in ({"repeats": "3"}, {"grid": True}, {"folder": None}):
        with pytest.raises(LongCatError, match="expected"):
            DatasetSettings.from_json(values)


@pytest.mark.parametrize("values", [{"repeats": 0}, {"caption_dropout": 1.1}, {"held_out": 0.6}, {"resolutions": "x"}])
def test_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(LongCatError):
        DatasetSettings(**values).check()


def test_a_batch_with_one_caption_a_line_or_one_for_all() -> None:
    images = torch.rand(3, 64, 64, 3)
    found = sources.from_batch(images, "one\n\n two \nthree\n", images.flip(0), torch.ones(1, 64, 64))
    assert [source.caption for source in found] == ["one", "two", "three"]
    made = dataset.build(DatasetSettings(resolutions="64", grid=16), found)
    assert made.edits and all(item.mask is not None for item in made.items)
    assert torch.allclose(made.items[0].pixels()[0].permute(1, 2, 0), images[0] * 2 - 1, atol=1 / 255)
    assert [source.caption for source in sources.from_batch(images, "all")] == ["all"] * 3
    for texts, masks, words in (("a\nb", None, "2 captions for 3"), ("a", torch.ones(2, 64, 64), "2 masks for 3")):
        with pytest.raises(LongCatError, match=words):
            sources.from_batch(images, texts, None, masks)


def test_the_contact_sheet_shows_pictures_as_they_become(folder: Path, read: Read) -> None:
    add(folder, "a.png", "一只猫", "red", (640, 640))
    add(folder, "bad.png").write_bytes(b"")
    sheet = contact_sheet.draw(read(resolutions="512"))
    assert sheet.width == 2 * (contact_sheet.TILE + contact_sheet.MARGIN) + contact_sheet.MARGIN
    assert sheet.getpixel((contact_sheet.MARGIN + 100, 140)) == (255, 0, 0)
    assert contact_sheet.legend(read()) == "1: a.png: 一只猫"


def test_a_large_dataset_says_how_much_the_sheet_leaves_out(folder: Path, read: Read) -> None:
    for index in range(contact_sheet.MOST_ITEMS + 2):
        add(folder, f"{index:02}.png", colour=(index, 0, 0))
    made = read()
    head = list(contact_sheet._head(made, contact_sheet.fonts(contact_sheet.TEXT)))
    assert "not shown: 2 items, 0 skipped" in head
    assert contact_sheet.draw(made).height < 8 * 400
