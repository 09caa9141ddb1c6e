"""families.toml: the handler and the build kit read the same families from it, and the doctor reads sizes with it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from deploy.doctor.sizes import Sizes, SizesError
from deploy.pack import families as kit
from deploy.sagemaker import fitting
from llava_sessions.text import families as handler

REPO = Path(__file__).resolve().parents[2]
CONTRIBUTING = REPO / "CONTRIBUTING.md"
TABLE_FILE = "handler/llava_sessions/text/families.toml"
CHECKPOINTS = [(family, row) for family in kit.families().values() for row in family.checkpoints]


def config_of(family: kit.Family, row: kit.Checkpoint) -> dict[str, Any]:
    """Return the part of a published config.json that has sizes."""
    text = {
        "model_type": row.text,
        "hidden_size": row.hidden,
        "num_hidden_layers": row.layers,
        "num_attention_heads": row.heads,
        "num_key_value_heads": row.kv_heads,
        "max_position_embeddings": row.context,
    }
    return {"model_type": family.type, "text_config": text, "vision_config": {"model_type": family.towers[0]}}


def sizes_of(folder: Path, config: dict[str, Any]) -> Sizes:
    (folder / "config.json").write_text(json.dumps(config))
    return Sizes.read(folder)


def test_the_handler_and_the_build_kit_read_the_same_table() -> None:
    assert kit.TABLE == handler.TABLE
    assert list(kit.families()) == list(handler.families())
    for kind, family in handler.families().items():
        other = kit.families()[kind]
        for name in ("type", "title", "class_name", "text", "towers", "processor"):
            assert getattr(family, name) == getattr(other, name)
        assert family.has_clips == (other.frame_tokens is not None)
        assert family.ids == tuple(hub_id for row in other.checkpoints for hub_id in row.ids)
    assert handler.texts() == tuple(kit.texts())
    assert [vars(row) for row in handler.refused().values()] == [vars(row) for row in kit.refused().values()]


def test_every_name_in_the_table_has_its_row() -> None:
    assert {tower for family in kit.families().values() for tower in family.towers} == set(kit.towers())
    assert {row.text for _, row in CHECKPOINTS} <= set(kit.texts())
    assert {family.text for family in kit.families().values()} <= set(kit.texts())
    assert not set(kit.refused()) & set(kit.families())
    ids = [hub_id for _, row in CHECKPOINTS for hub_id in row.ids]
    assert len(ids) == len(set(ids))


def test_a_further_family_touches_the_files_of_the_checklist_only() -> None:
    """CONTRIBUTING.md has it. The code of a family is in the modules of its processor, and in no other."""
    section = re.search(r"## A further model family\n(.*?)\n## ", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL)[
        1
    ]
    rows = re.findall(r"^\| ([\w ]+) \| (.+?) \|", section, re.MULTILINE)
    files = {file for part, file in rows if part != "part" and file != "none"}
    processors = "handler/llava_sessions/text/processors"
    assert files == {f"`{name}`" for name in (TABLE_FILE, f"{processors}/NAME.py", "tests/support/tiny_families.py")}
    assert [part for part, _ in rows[1:]] == ["config check", "processor", "features", "template", "tests"]
    assert all(
        (REPO / path).is_file() for path in re.findall(r"`([\w/]+\.(?:py|toml|md))`", section) if "NAME" not in path
    )

    modules = [path for folder in ("handler", "deploy") for path in sorted((REPO / folder).rglob("*.py"))]
    own = {f"{family.processor}.py" for family in kit.families().values()}
    names = {name for family in kit.families().values() for name in (family.type, family.class_name)} - {"llava"}
    found = [
        (path.relative_to(REPO), node.value)
        for path in modules
        if path.parent != REPO / processors or path.name not in own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert found == []


@pytest.mark.parametrize(("family", "row"), CHECKPOINTS, ids=lambda one: getattr(one, "name", ""))
def test_the_doctor_reads_the_sizes_of_a_published_checkpoint(
    family: kit.Family, row: kit.Checkpoint, tmp_path: Path
) -> None:
    config = config_of(family, row)
    sizes = sizes_of(tmp_path, config)
    head_dim = row.head_dim or row.hidden // row.heads
    assert (sizes.hidden, sizes.head_dim, sizes.context_tokens) == (row.hidden, head_dim, row.context)
    assert sizes.kv_numbers == row.layers * 2 * row.kv_heads * head_dim
    assert sizes.picture_tokens == family.tokens_of_picture(kit.towers()[family.towers[0]].side)
    shape = fitting.known_shape(config)
    assert shape is not None
    assert shape.checkpoint == row


@pytest.mark.parametrize(
    ("kind", "picture", "frame"),
    [
        ("llava", 576, None),
        ("llava_next", 2928, None),  # at 672 x 672: 576 + 48 x 48 + 48 ends of line
        ("llava_next_video", 2928, 144),  # 24 x 24 patches, pooled 2 by 2
        ("llava_onevision", 7371, 196),  # at most 9 tiles: 729 + 81 x 81 + 81 ends of line; 27 x 27 patches, pooled
        ("internvl", 13 * 256, 256),  # 12 tiles and the whole picture; 32 x 32 patches, shuffled 2 by 2
    ],
)
def test_tokens_of_pictures_and_frames_by_hand(kind: str, picture: int, frame: int | None) -> None:
    family = kit.families()[kind]
    side = kit.towers()[family.towers[0]].side
    assert (family.tokens_of_picture(side), family.tokens_of_frame(side)) == (picture, frame)


def test_an_internvl_config_has_sides_as_pairs(tmp_path: Path) -> None:
    vision = {"model_type": "internvl_vision", "image_size": [448, 448], "patch_size": [14, 14]}
    config = {"model_type": "internvl", "vision_config": vision, "text_config": {"model_type": "qwen3"}}
    sizes = sizes_of(tmp_path, config)
    assert (sizes.picture_tokens, sizes.head_dim) == (3328, 128)
    assert sizes_of(tmp_path, config | {"downsample_ratio": 1.0}).picture_tokens == 13 * 1024
    vision["image_size"] = [448, 224]
    with pytest.raises(SizesError, match=r"`image_size` must be an integer from 1, got \[448, 224\]"):
        sizes_of(tmp_path, config)
    vision["image_size"] = 448
    for ratio in (0, 2.0, "half"):
        with pytest.raises(SizesError, match=f"`downsample_ratio` must be a number from 0 to 1, got {ratio!r}"):
            sizes_of(tmp_path, config | {"downsample_ratio": ratio})
