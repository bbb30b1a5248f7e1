"""Downloads official archives with resume and checksums, and unpacks them safely.

A file in the folder `[Download] archives` with the right checksum is used as it is; a missing file
is downloaded into it. An interrupted download resumes where it stopped, in the same run or the next.
Nothing is unpacked outside the target folder.
"""

import hashlib
import io
import shutil
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tasks.runtime.errors import StageError, first_line

ATTEMPTS = 5  # for each file
PARALLEL = 4  # downloads at a time
PATIENCE = 1.0  # seconds before the second attempt; doubled before each further one
# An archive of photographs unpacks to about its own size. One that grows more than this is a bomb.
MAX_GROWTH = 20
MAX_SMALL = 1 << 30  # bytes that even the smallest archive may unpack to
MAX_MEMBERS = 50_000  # of the official archives the annotations of Pets hold most: about 18,500
MAX_DOWNLOAD = 20 << 30  # bytes of one file; the largest official archive has 2.75 GB


def fetch(files: Sequence[dict[str, str]], folder: Path, card: str) -> list[Path]:
    """The paths of a card's source files: downloaded where missing, each checked against its md5.

    Each of `files` has `name`, `md5` and, where it can still be downloaded, `url`. Raises
    StageError naming the file, what is wrong with it, and what to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [entry for entry in files if not (folder / entry["name"]).exists()]
    if homeless := [entry["name"] for entry in missing if not entry.get("url")]:
        raise StageError(
            f"card {card}: {', '.join(homeless)} can no longer be downloaded from the official "
            f"host; put the file{'s' * (len(homeless) > 1)} into {folder} ([Download] archives), or "
            "read the card's copy on the hub ([Download] mirror = true)"
        )
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda entry: _download(entry, folder, card), missing))
    for entry in files:
        path = folder / entry["name"]
        if entry not in missing and (digest := md5(path)) != entry["md5"]:
            raise StageError(
                f"card {card}: {path} has md5 {digest}, not {entry['md5']}; it is damaged or another "
                "version: delete it to have it downloaded, put the right file there, or, if this is the "
                f"version that you want, {_own_checksum(card)}"
            )
    return [folder / entry["name"] for entry in files]


def _download(entry: dict[str, str], folder: Path, card: str) -> None:
    """Download one file by way of `NAME.part`, which a later attempt resumes."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    part = folder / (entry["name"] + ".part")
    reason = remedy = ""
    for attempt in range(ATTEMPTS):
        remedy = ""
        if attempt:
            time.sleep(PATIENCE * 2 ** (attempt - 1))
        try:
            with Bounded(part, "ab") as file:
                http_get(
                    entry["url"],
                    file,
                    resume_size=file.tell(),
                    displayed_filename=entry["name"],
                    headers={"Accept-Encoding": "identity"},
                )
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            reason = f"the server answered {status}"
            if status == 416:  # the part is as long as the file, or longer: its md5 decides
                reason = ""
            elif 400 <= status < 500 and status not in (408, 429):
                break
        except Exception as error:  # of the network, the disk, or the library's consistency check
            reason = first_line(error)
        else:
            reason = ""
        if reason:
            continue
        if (digest := md5(part)) == entry["md5"]:
            part.replace(folder / entry["name"])
            return
        reason = f"what came has md5 {digest}, not {entry['md5']}"
        remedy = f"; if the host has published another version, {_own_checksum(card)}"
        part.unlink()
    raise StageError(
        f"card {card}: {entry['url']} could not be downloaded: {reason}; run again to go on, or put "
        f"{entry['name']} into {folder} ([Download] archives){remedy}"
    )


def _own_checksum(card: str) -> str:
    """What to do about a file that is right and whose md5 the card does not have."""
    return f"write its md5 into a card of your own, cards/{card}.md, which is read in place of ours"


class Bounded(io.FileIO):
    """A file that refuses to grow beyond MAX_DOWNLOAD bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > MAX_DOWNLOAD:
            raise OSError(f"the server sends more than {MAX_DOWNLOAD:,} bytes")
        return super().write(data)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive below `folder`: plain files and folders only, and nothing outside it.

    Links, devices, absolute paths and paths with `..` are refused, as are archives that hold far
    more than photographs could. Raises StageError naming the archive and the member.
    """
    folder.mkdir(parents=True, exist_ok=True)
    allowed = max(MAX_SMALL, MAX_GROWTH * archive.stat().st_size)
    size = members = 0
    seen: set[str] = set()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                members += 1
                size += member.size
                if members > MAX_MEMBERS:
                    raise StageError(f"{archive} holds more than {MAX_MEMBERS:,} files; refused")
                if size > allowed:
                    raise StageError(f"{archive} unpacks to more than {allowed:,} bytes; refused")
                if member.name.startswith(("/", "\\")):
                    raise StageError(f"{archive} holds the absolute path {member.name!r}; refused")
                if not (member.isfile() or member.isdir()):
                    raise StageError(f"{archive} holds {member.name!r}, a link or device; refused")
                if member.isfile() and member.name in seen:
                    raise StageError(f"{archive} holds {member.name!r} twice; refused")
                seen.add(member.name)
                tar.extract(member, folder, filter="data")
    except tarfile.FilterError as error:
        raise StageError(f"{archive} would write outside its folder: {error}") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise StageError(f"{archive} cannot be unpacked: {first_line(error)}") from error


def unpacked(
    archives: Sequence[Path], folder: Path, report: Callable[[str], Any] = lambda text: None
) -> Path:
    """Unpack all archives into `folder`, and copy all other files into it. Returns the folder.

    A marker file shows that the folder is complete; a folder without it is made anew. `report` takes
    a line of progress.
    """
    done = folder / ".unpacked"
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for archive in archives:
        report(f"unpacking {archive.name}")
        if tarfile.is_tarfile(archive):
            unpack(archive, folder)
        else:
            shutil.copyfile(archive, folder / archive.name)
    done.touch()
    return folder


def md5(path: Path) -> str:
    """The md5 of a file, in hex. Dataset authors publish it; it detects damage, not forgery."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
