"""A folder in an object store (`s3://BUCKET/FOLDER`), by fsspec; its errors in one line."""

import contextlib
from collections.abc import Iterator
from typing import Any

from pipeline.errors import TransientError, UserError

_REFUSED = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "ProfileNotFound", "NoRegionError")


def is_url(source: str) -> bool:
    return "://" in source


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Errors of the store in one line. Its own libraries raise many kinds; what is no user's fault may be retried."""
    try:
        yield
    except (UserError, TransientError):
        raise
    except FileNotFoundError as error:
        raise UserError(f"{url}: no such bucket or object; pack, and upload the folder of the shards whole") from error
    except PermissionError as error:
        raise UserError(f"{url}: access denied; check the credentials (such as AWS_PROFILE)") from error
    except Exception as error:
        kind = type(error).__name__
        if kind in _REFUSED:
            raise UserError(
                f"{url}: no usable credentials ({kind}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY"
            ) from error
        text = " ".join(str(error).split())[:200]
        raise TransientError(f"{url} can't be read ({kind}: {text}); run the same command again") from error


class Store:
    """A folder in an object store. Raises UserError where the package for its protocol is missing."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            from fsspec import url_to_fs
            from fsspec.core import get_filesystem_class

            get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{url}: {protocol}:// requires a package that is not installed ({error}); "
                "install it with: pip install s3fs"
                if protocol in ("s3", "s3a")
                else f"{url}: {protocol}:// can't be read here ({error}); install its fsspec package, or give s3://"
            ) from error
        with _explained(url):
            self.files, self.path = url_to_fs(self.url)

    def list(self) -> dict[str, dict[str, Any]]:
        """What the store tells of each file of the folder, by name: one request for a thousand files. Empty where it
        can't or may not be listed."""
        with _explained(self.url):
            try:
                self.files.invalidate_cache()
                found = self.files.find(self.path, detail=True)
            except (PermissionError, NotImplementedError):
                return {}
        return {path.removeprefix(f"{self.path}/"): info for path, info in found.items()}

    def info(self, name: str) -> dict[str, Any]:
        with _explained(f"{self.url}/{name}"):
            return self.files.info(f"{self.path}/{name}")

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        with _explained(f"{self.url}/{name}"):
            return self.files.cat_file(f"{self.path}/{name}", start=start, end=end)
