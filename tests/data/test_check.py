"""Preflight: every fault of a pair is named with its place and remedy, and a sound pair passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from qsr_plugin.data.check import Problem, check_options, check_pair
from qsr_plugin.data.resize import downscale
from qsr_plugin.data.sources import open_source
from tests.data.conftest import change, contents, noise, write_png


@pytest.fixture
def databases(tmp_path: Path, build: Callable) -> tuple[Path, Path]:
    """A sound pair of LMDBs at scale 2: keys a_s001 to d_s001, GT of 40 x 50 pixels."""
    report = build(tmp_path / "set one", sub_image=0)
    return report.gt, report.lq


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A sound pair of folders at scale 2: a.png and b.png, GT of 24 x 16 pixels."""
    for seed, name in enumerate("ab"):
        high = noise(24, 16, seed)
        write_png(tmp_path / "HR" / f"{name}.png", high)
        write_png(tmp_path / "LR" / f"{name}.png", downscale(high, 2))
    return tmp_path / "HR", tmp_path / "LR"


def only(problems: list[Problem]) -> str:
    """Return the text of the one problem there must be."""
    assert len(problems) == 1, [str(problem) for problem in problems]
    return str(problems[0])


def test_sound_pairs_pass(databases: tuple[Path, Path], folders: tuple[Path, Path]) -> None:
    assert check_pair(*databases, 2, gt_size=40) == []
    assert check_pair(*folders, 2, gt_size=16) == []


def test_the_database_is_free_for_the_host_afterwards(databases: tuple[Path, Path]) -> None:
    """From py-lmdb 2 on, a process cannot open the same database twice."""
    with open_source(databases[0], as_lmdb=True) as source:
        assert source.read("a_s001")
    with pytest.raises(lmdb.Error, match="closed"):
        source.read("a_s001")
    lmdb.open(str(source.path), readonly=True, lock=False).close()


def test_meta_info_absent(databases: tuple[Path, Path]) -> None:
    (databases[1] / "meta_info.txt").unlink()
    text = only(check_pair(*databases, 2))
    assert "LQ.lmdb: looked for meta_info.txt in it, found only 2: data.mdb, lock.mdb" in text
    assert "qsr data build" in text


def test_meta_info_empty_or_database_absent_or_garbage(databases: tuple[Path, Path]) -> None:
    gt, lq = databases
    (gt / "meta_info.txt").write_text("")
    (lq / "data.mdb").write_bytes(b"no database" * 1000)
    first, second = map(str, check_pair(gt, lq, 2))
    assert "GT.lmdb: meta_info.txt lists no image" in first
    assert "LQ.lmdb: the database does not open" in second
    (lq / "data.mdb").unlink()
    assert "looked for data.mdb in it, found only 2: lock.mdb, meta_info.txt" in str(check_pair(gt, lq, 2)[1])


def test_a_key_listed_but_not_stored(databases: tuple[Path, Path]) -> None:
    change(databases[0], "b_s001", None)
    text = only(check_pair(*databases, 2))
    assert "GT.lmdb: keys (1: b_s001): are listed in meta_info.txt but not stored" in text and "stale" in text


def test_a_key_stored_but_not_listed(databases: tuple[Path, Path]) -> None:
    change(databases[1], "z", contents(databases[1])[b"a_s001"])
    assert "LQ.lmdb: keys (1: z): are stored but not listed" in only(check_pair(*databases, 2))


def test_keys_missing_on_one_side(databases: tuple[Path, Path]) -> None:
    gt, lq = databases
    for key in ("b_s001", "d_s001"):
        change(lq, key, None)
    lines = (lq / "meta_info.txt").read_text().splitlines(keepends=True)
    (lq / "meta_info.txt").write_text(lines[0] + lines[2])
    text = only(check_pair(gt, lq, 2))
    assert "LQ.lmdb: keys (2: b_s001, d_s001): are missing here but listed in" in text and "GT.lmdb" in text


def test_the_order_of_meta_info_does_not_matter(databases: tuple[Path, Path]) -> None:
    """The host sorts the keys of both sides."""
    lines = (databases[1] / "meta_info.txt").read_text().splitlines(keepends=True)
    (databases[1] / "meta_info.txt").write_text("".join(reversed(lines)))
    assert check_pair(*databases, 2) == []


def test_values_that_do_not_decode(databases: tuple[Path, Path]) -> None:
    gt, lq = databases
    change(lq, "a_s001", b"")
    change(lq, "b_s001", contents(lq)[b"b_s001"][:-200])
    change(gt, "c_s001", b"<html>")
    texts = [str(problem) for problem in check_pair(gt, lq, 2)]
    assert len(texts) == 3
    assert "LQ.lmdb: a_s001: is empty (0 bytes)" in texts[0]
    assert "LQ.lmdb: b_s001: is damaged" in texts[1]
    assert "GT.lmdb: c_s001: is not a PNG" in texts[2]


def test_a_sample_decodes_less_but_still_compares_all_keys(databases: tuple[Path, Path]) -> None:
    gt, lq = databases
    change(lq, "b_s001", b"damaged")
    assert check_pair(gt, lq, 2, sample=2) == []
    assert len(check_pair(gt, lq, 2, sample=4)) == 1
    change(lq, "d_s001", None)
    assert "d_s001" in only(check_pair(gt, lq, 2, sample=1))


def test_sizes_that_do_not_match_name_both_images(databases: tuple[Path, Path], folders: tuple[Path, Path]) -> None:
    change(databases[1], "a_s001", contents(databases[0])[b"a_s001"])
    text = only(check_pair(*databases, 2))
    assert "GT.lmdb" in text and "LQ.lmdb: a_s001: GT is 40x50, LQ is 40x50; GT must be 80x100 at scale 2" in text
    gt, lq = folders
    write_png(lq / "a.png", noise(11, 8))
    text = only(check_pair(gt, lq, 2))
    assert str(gt) in text and str(lq) in text and "a.png: GT is 24x16, LQ is 11x8" in text


def test_validation_may_have_spare_pixels(folders: tuple[Path, Path]) -> None:
    gt, lq = folders
    write_png(gt / "a.png", noise(25, 17))
    assert "GT must be 24x16" in only(check_pair(gt, lq, 2))
    assert check_pair(gt, lq, 2, exact=False) == []
    write_png(gt / "a.png", noise(26, 16))
    assert len(check_pair(gt, lq, 2, exact=False)) == 1
    write_png(gt / "a.png", noise(23, 16))
    assert len(check_pair(gt, lq, 2, exact=False)) == 1


def test_the_crop_must_fit(folders: tuple[Path, Path]) -> None:
    problems = check_pair(*folders, 2, gt_size=20)
    assert "a.png: is 24x16, smaller than the training crop gt_size = 20" in str(problems[0])
    assert len(problems) == 2
    assert "gt_size: 15: is not a multiple of scale = 2" in only(check_pair(*folders, 2, gt_size=15))


@pytest.mark.parametrize("state", ["absent", "empty", "a file"])
def test_empty_and_absent_folders(folders: tuple[Path, Path], tmp_path: Path, state: str) -> None:
    path = tmp_path / "other"
    if state == "empty":
        (path / "sub").mkdir(parents=True)
    elif state == "a file":
        path.touch()
    text = only(check_pair(folders[0], path, 2))
    expected = {"absent": "found nothing", "empty": "looked for image files, found none", "a file": "found a file"}
    assert f"{path}: " in text and expected[state] in text


def test_a_template_that_does_not_match_is_guessed(folders: tuple[Path, Path]) -> None:
    gt, lq = folders
    for path in list(lq.iterdir()):
        path.rename(lq / f"{path.stem}x2.png")
    text = only(check_pair(gt, lq, 2))
    assert f"{lq}: files (2: a.png, b.png): looked for by filename_tmpl '{{}}', found 2: ax2.png, bx2.png" in text
    assert "Try filename_tmpl: '{}x2'" in text
    assert check_pair(gt, lq, 2, filename_tmpl="{}x2") == []


def test_files_on_one_side_only(folders: tuple[Path, Path]) -> None:
    gt, lq = folders
    write_png(lq / "c.png", noise(4, 4))
    assert "files (1: c.png): have no partner" in only(check_pair(gt, lq, 2))
    (lq / "c.png").rename(gt / "c.png")
    assert "files (1: c.png): looked for by" in only(check_pair(gt, lq, 2))


def test_other_files_between_the_images_are_found(folders: tuple[Path, Path]) -> None:
    """The host takes every file that is not hidden for an image."""
    for folder in folders:
        (folder / ".hidden").touch()
    assert check_pair(*folders, 2) == []
    for folder in folders:
        (folder / "list.txt").write_text("a b")
    assert ["list.txt: is not a PNG" in str(problem) for problem in check_pair(*folders, 2)] == [True, True]


def test_a_meta_info_file_selects(folders: tuple[Path, Path], tmp_path: Path) -> None:
    gt, lq = folders
    (lq / "b.png").unlink()
    listing = tmp_path / "meta.txt"
    listing.write_text("a.png (24,16,3)\n")
    assert check_pair(gt, lq, 2, meta_info_file=listing) == []
    listing.write_text("a.png (24,16,3)\nq.png (24,16,3)\n")
    assert "files (1: q.png): are listed in" in str(check_pair(gt, lq, 2, meta_info_file=listing)[0])
    assert "cannot be read" in only(check_pair(gt, lq, 2, meta_info_file=tmp_path / "none"))


def test_the_same_database_twice(databases: tuple[Path, Path]) -> None:
    assert "is given as GT and as LQ" in only(check_pair(databases[0], databases[0], 2))


def test_an_lmdb_must_be_called_lmdb(databases: tuple[Path, Path]) -> None:
    renamed = shutil.move(databases[1], databases[1].with_suffix(".db"))
    assert "ends in .lmdb" in only(check_pair(databases[0], renamed, 2))


def test_read_only_home_and_non_ascii_paths(
    databases: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    target = tmp_path / "данные set" / ("d" * 120)
    target.mkdir(parents=True)
    for path in databases:
        copy = Path(shutil.copytree(path, target / path.name))
        (copy / "lock.mdb").unlink()
        copy.chmod(0o555)
        (copy / "data.mdb").chmod(0o444)
    before = sorted(path.name for path in target.rglob("*"))
    below_home = Path("~") / target.relative_to(tmp_path)
    assert check_pair(below_home / "GT.lmdb", below_home / "LQ.lmdb", 2) == []
    assert sorted(path.name for path in target.rglob("*")) == before  # nothing is written, so no permission is needed


def options(gt: Path, lq: Path, **changes: object) -> dict:
    kind = "lmdb" if gt.suffix == ".lmdb" else "disk"
    base = {"type": "PairedImageDataset", "dataroot_gt": str(gt), "dataroot_lq": str(lq), "io_backend": {"type": kind}}
    return {**base, **changes}


def test_options_check_every_data_set(databases: tuple[Path, Path], folders: tuple[Path, Path]) -> None:
    opt = {
        "scale": 2,
        "datasets": {
            "train": options(*databases, gt_size=32),
            "val": options(*databases),
            "val_2": options(*folders),
            "test_1": {"type": "SingleImageDataset", "dataroot_lq": "nowhere"},
        },
    }
    assert check_options(opt) == []
    (folders[1] / "a.png").write_bytes(b"")
    change(databases[1], "c_s001", None)
    problems = check_options(opt)
    assert [problem.dataset for problem in problems] == ["train", "val", "val_2"]
    assert str(problems[2]).startswith(f"val_2: {folders[1]}: a.png: is empty")


def test_options_crop_and_exactness_depend_on_the_phase(folders: tuple[Path, Path]) -> None:
    write_png(folders[0] / "a.png", noise(25, 17))
    val, train = options(*folders), options(*folders, gt_size=64)
    assert check_options({"scale": 2, "datasets": {"val": val}}) == []
    texts = [str(problem) for problem in check_options({"scale": 2, "datasets": {"train": train}})]
    assert sum("gt_size = 64" in text for text in texts) == 2
    assert sum("GT must be 24x16" in text for text in texts) == 1


def test_options_that_lack_something(folders: tuple[Path, Path]) -> None:
    dataset = options(*folders)
    del dataset["dataroot_lq"]
    text = only(check_options({"datasets": {"train": dataset}}))
    assert text == ("train: datasets.train: lacks dataroot_lq, scale (an integer of 1 or more), gt_size; add it.")
    assert check_options({}) == []


def test_options_decode_only_a_sample(folders: tuple[Path, Path]) -> None:
    (folders[1] / "b.png").write_bytes(b"")
    opt = {"scale": 2, "datasets": {"val": options(*folders)}}
    assert check_options(opt, sample=1) == []
    assert len(check_options(opt, sample=None)) == 1
