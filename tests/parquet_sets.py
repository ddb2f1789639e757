"""Hugging Face parquet files, as data sets lie on its hub."""

import json
from pathlib import Path

import pytest
from test_layouts import SYNSETS, jpeg
from test_tar_layouts import NUMBER, samples


def write_table(path: Path, rows: list[tuple[str | None, bytes, object]], names: tuple = (), group: int = 2) -> None:
    """rows: path, bytes and label of each image; names: of the classes; group: rows of a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": data, "path": name} for name, data, _ in rows], kind)
    table = pa.table({"image": image, "label": pa.array([label for _, _, label in rows])})
    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path, row_group_size=group)


@pytest.fixture
def parquet(tmp_path) -> Path:
    """As `ILSVRC/imagenet-1k` lies: `data/train-00000-of-00002.parquet`, words as names of the classes, the synset at
    the end of each image's name, a test split without labels."""
    pytest.importorskip("pyarrow")
    root = tmp_path / "hf"
    words = tuple(f"words of {synset}, and more" for synset in sorted(SYNSETS.values()))
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [(f"{key}_{synset}.JPEG", data, NUMBER[synset]) for key, synset, data in samples(split)]
        half = len(rows) // 2
        write_table(root / f"data/{name}-00000-of-00002.parquet", rows[:half], words)
        write_table(root / f"data/{name}-00001-of-00002.parquet", rows[half:], words)
    write_table(root / "data/test-00000-of-00001.parquet", [(None, jpeg(1), -1)], words)
    return root
