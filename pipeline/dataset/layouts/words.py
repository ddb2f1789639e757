"""What the classes are called in words, by the lists that come with the several forms of ImageNet."""

import json
from pathlib import Path

from pipeline.dataset import imagenet
from pipeline.errors import UserError

IMAGENET_100_LIST = "Labels.json"  #: {synset: words}
TINY_WORDS = "words.txt"  #: "n00001740<tab>entity", of all of WordNet


def read_words(root: Path) -> dict[str, str]:
    """Class -> words; empty where no list is there. Raises UserError where one is damaged."""
    words = imagenet.read_synset_words(root)
    if words:
        return words
    path = root / IMAGENET_100_LIST
    try:
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(found, dict):
                raise ValueError(f"it holds a {type(found).__name__} instead of an object of synsets and words")
            return {str(synset): str(text) for synset, text in found.items()}
        path = root / TINY_WORDS
        if path.is_file():
            lines = (line.partition("\t") for line in path.read_text(encoding="utf-8-sig").splitlines())
            return {synset: text.strip() for synset, tab, text in lines if tab}
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); unpack the data set again, or remove the file") from error
    return {}
