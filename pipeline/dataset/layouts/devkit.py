"""The development kit of ILSVRC 2012 (`ILSVRC2012_devkit_t12.tar.gz`): the labels of the validation images.

Line k of the ground truth is the ILSVRC id (1 to 1,000) of `ILSVRC2012_val_<k>`. These ids are not the order of the
sorted synsets: `meta.mat` maps each to its synset, and so does `map_clsloc.txt` of the later kits.
"""

import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.layouts.mat_file import read_mat
from pipeline.errors import UserError

TRUTH, META, MAP = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "map_clsloc.txt"
ARCHIVE = re.compile(r"ILSVRC20\d\d_devkit(_\w+)?\.(tar\.gz|tgz|tar)")
FOLDER = re.compile(r"ILSVRC20\d\d_devkit\w*|devkit")
_LARGEST = 64 << 20  # bytes of a member that is read; the real ones have less than 2 MB
_MAP_LINE = re.compile(r"(n\d{8})\s+(\d+)\s*(.*)")


@dataclass(frozen=True)
class Devkit:
    """A kit that was found. files: name -> content of those of its files that matter; source: the kit's own path."""

    source: Path
    files: dict[str, bytes]

    def read_synsets(self) -> dict[int, tuple[str, str]]:
        """ILSVRC id -> (synset, words). Raises UserError where the kit does not have them."""
        try:
            if META in self.files:
                rows = read_mat(self.files[META])["synsets"]
                return {int(row["ILSVRC2012_ID"][0]): (row["WNID"], row["words"]) for row in rows}
            if MAP in self.files:
                lines = filter(None, map(_MAP_LINE.match, self.files[MAP].decode().splitlines()))
                return {int(line[2]): (line[1], line[3].replace("_", " ").strip()) for line in lines}
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{META} or {MAP} of {self.source} can't be read ({error}); download the kit again"
            ) from error
        raise UserError(
            f"{self.source} has the ground truth in ILSVRC ids but no {META}, which maps them to synsets; "
            "unpack the whole ILSVRC2012_devkit_t12.tar.gz of image-net.org"
        )

    def read_labels(self) -> dict[str, str]:
        """Validation image (`ILSVRC2012_val_00000001`) -> synset. Raises UserError where it does not say."""
        synsets = self.read_synsets()
        labels = {}
        for number, line in enumerate(self.files[TRUTH].decode("latin1").split(), 1):
            if not line.isdigit() or int(line) not in synsets:
                raise UserError(
                    f"{TRUTH} of {self.source}, line {number}: expected an ILSVRC id of {META}, got {line[:40]!r}; "
                    "download the kit again"
                )
            labels[f"ILSVRC2012_val_{number:08d}"] = synsets[int(line)][0]
        return labels


def find_devkit(folders: list[Path]) -> Devkit | None:
    """The first kit in or directly below `folders`: unpacked, or as its archive. UserError for a damaged archive."""
    for folder in folders:
        if not folder.is_dir():
            continue
        here = sorted(folder.iterdir())
        homes = [folder, folder / "data"]
        homes += [home / "data" for home in here if FOLDER.fullmatch(home.name)]
        for home in homes:
            if (home / TRUTH).is_file():
                files = {name: (home / name).read_bytes() for name in (TRUTH, META, MAP) if (home / name).is_file()}
                return Devkit(home if home == folder or home.parent == folder else home.parent, files)
        for path in here:
            if ARCHIVE.fullmatch(path.name) and path.is_file():
                return read_archive(path)
    return None


def read_archive(path: Path) -> Devkit:
    """The kit in its archive. UserError where the archive is damaged or another one."""
    files = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in (TRUTH, META, MAP) and member.isreg() and member.size <= _LARGEST:
                    file = tar.extractfile(member)
                    assert file is not None
                    files[name] = file.read()
    except PermissionError:
        raise
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise UserError(f"{path} can't be read ({reason}); download it again from image-net.org") from error
    if TRUTH not in files:
        raise UserError(f"{path} holds no {TRUTH}; is it ILSVRC2012_devkit_t12.tar.gz of image-net.org?")
    return Devkit(path, files)
