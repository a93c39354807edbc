"""Adapters on the Hub, or in a folder that stands for one.

Everything goes through the `huggingface_hub` client, so its tokens (`hf auth login`, `HF_TOKEN`), private repositories, cache and
`HF_ENDPOINT` work as they do elsewhere. Only our four files are sent and fetched, never a pickle, in one commit. What was
fetched is compared with the hashes that the Hub states, because the client compares only sizes.

A folder that stands for a Hub has `<folder>/<user>/<name>/` for each repository, without revisions. It is used when
`hub_folder` is given or the environment variable `ZOO_HUB_FOLDER` is set.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeVar

from zoo.disk.cards import retarget
from zoo.disk.layout import CARD, CONFIG, METRICS, PICKLE_SUFFIXES, WEIGHTS
from zoo.errors import HubError, ZooError, nearest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from zoo.host import Host

T = TypeVar("T")

RETRY_WAITS = (1.0, 3.0)  # seconds before each further try of a request that the client itself does not repeat
_LOG = logging.getLogger("zoo")
_REVISION = re.compile(r"(?![-/.])(?!.*(\.\.|//|@\{))[\w./+-]{1,200}(?<![/.])")
_BROKEN = ("ReadError", "WriteError", "RemoteProtocolError", "ReadTimeout", "WriteTimeout")


def parse_repo_id(text: str) -> tuple[str, str | None]:
    """`"user/name@revision"` as ("user/name", "revision"); the revision is None if there is none.

    Raises:
        HubError: it is not of this form.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo_id, at, revision = text.partition("@")
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("it needs a user or organization in front")
    except HFValidationError as error:
        raise HubError(
            f"'{text}' is no Hub repository ({error}). Write it as user/name or user/name@revision."
        ) from error
    if at and not _REVISION.fullmatch(revision):
        raise HubError(
            f"'{revision}' in '{text}' is no revision. Name a branch, a tag or a commit, as in {repo_id}@main."
        )
    return repo_id, revision or None


def push(
    model_or_folder: Host | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    hub_folder: str | Path | None = None,
) -> str:
    """Publish a model's active adapters and head, or a saved folder, and return the address.

    Args:
        repo_id: `user/name`, or `user/name@branch`. Made if it does not exist, and so is the branch.
        private: whether a new repository is private; None follows the account's default.
        token: instead of the one that the Hub's client has stored.
        hub_folder: publish to this folder instead of the Hub.

    Raises:
        HubError: not allowed, not reachable, or broken off; the repository then has its old files.
    """
    from huggingface_hub import CommitOperationAdd

    repo_id, at = parse_repo_id(repo_id)
    revision = revision or at
    folder = hub_folder or os.environ.get("ZOO_HUB_FOLDER")
    if folder:
        _no_revision(revision, folder)
        return publish_to_folder(model_or_folder, folder, repo_id).resolve().as_uri()
    files = _files(model_or_folder, repo_id)
    api = _api(token)
    with _explained(repo_id, revision, token, writing=True):
        url = _again(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if private and _again(lambda: api.model_info(repo_id)).private is False:
            raise HubError(
                f"'{repo_id}' exists already and is public, but private=True was asked for, so nothing was sent. Make it "
                "private in its settings on the Hub, or choose another name."
            )
        if revision not in (None, "main"):
            _again(lambda: api.create_branch(repo_id, branch=str(revision), exist_ok=True))
        # One commit, so that a reader never sees the weights of one save with the config of another.
        _again(
            lambda: api.create_commit(
                repo_id,
                operations=[CommitOperationAdd(name, data) for name, data in files.items() if data],
                commit_message=commit_message or "Adapter saved by adapter-zoo",
                revision=revision,
            )
        )
    return f"{url}/tree/{revision}" if revision not in (None, "main") else str(url)


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    hub_folder: str | Path | None = None,
) -> Path:
    """Fetch an adapter and return its folder, which `zoo.load(adapter=...)` and `zoo.disk.read` take.

    The folder is in the client's cache: fetched once, and used from there when the Hub cannot be reached.

    Raises:
        HubError: not found, not allowed, not reachable, broken off, damaged, or not an adapter; with what to do.
    """
    repo_id, at = parse_repo_id(repo_id)
    revision = revision or at
    folder = hub_folder or os.environ.get("ZOO_HUB_FOLDER")
    if folder:
        _no_revision(revision, folder)
        return _in_folder(Path(folder), repo_id)
    with _explained(repo_id, revision, token):
        return _fetch(_api(token), repo_id, revision, cache_dir)


def publish_to_folder(model_or_folder: Host | str | Path, hub_folder: str | Path, repo_id: str) -> Path:
    """Write an adapter to `<hub_folder>/<user>/<name>/`, replacing an older one as a whole; returns that folder."""
    from zoo.disk import write_files

    repo_id, _ = parse_repo_id(repo_id)
    target = Path(hub_folder) / repo_id
    write_files(target, _files(model_or_folder, repo_id))
    return target


# -- what is sent and fetched -----------------------------------------------------------------------------------------


def _files(source: Host | str | Path, repo_id: str) -> dict[str, bytes]:
    """The four files, read back and checked, with a card that says to load `repo_id`."""
    from zoo import disk

    if isinstance(source, (str, Path)):
        files = disk.contents(source)
    else:
        with tempfile.TemporaryDirectory() as folder:
            disk.save(source, folder, source=repo_id)
            files = disk.contents(folder)
    files[CARD] = retarget(files[CARD].decode(), repo_id).encode()
    return files


def _fetch(api: HfApi, repo_id: str, revision: str | None, cache: str | Path | None) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def get(name: str, at: str | None, *, local: bool = False, force: bool = False) -> Path:
        def request() -> Any:
            return api.hf_hub_download(
                repo_id, name, revision=at, cache_dir=cache, local_files_only=local, force_download=force
            )

        return Path(_again(request))

    try:
        info = _again(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
    except Exception as error:
        if not _is_unreachable(error):
            raise
        try:
            folder = get(CONFIG, revision, local=True).parent
            get(WEIGHTS, revision, local=True)
        except LocalEntryNotFoundError:
            raise error from None
        _LOG.warning("The Hub cannot be reached (%s); using '%s' from the cache.", type(error).__name__, repo_id)
        return folder
    listed = {sibling.rfilename: sibling for sibling in info.siblings or []}
    _check_names(repo_id, list(listed))
    # The config first and by the revision's name, so that the cache remembers what that name stood for.
    folder = Path()
    for name in (CONFIG, WEIGHTS, METRICS, CARD):
        if name not in listed:
            continue
        path = get(name, revision if name == CONFIG else info.sha)
        if name == CONFIG and path.parent.name != info.sha:  # pushed to just now
            path = get(name, info.sha)
        if not _is_intact(path, listed[name]):
            path = get(name, info.sha, force=True)
        if not _is_intact(path, listed[name]):
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise HubError(
                f"'{name}' of '{repo_id}' arrived twice with another hash than the Hub states, so it was thrown away. "
                "Something between here and the Hub changes files (a proxy or a mirror): check HF_ENDPOINT, try again later."
            )
        folder = path.parent
    return folder


def _check_names(repo_id: str, names: list[str]) -> None:
    """Raise HubError unless the repository holds an adapter, and no file whose name leads out of its folder."""
    for name in names:
        windows = PureWindowsPath(name)
        if windows.drive or windows.root or ".." in windows.parts or PurePosixPath(name).is_absolute():
            raise HubError(
                f"'{repo_id}' lists a file named {name!r}, which would lead out of its folder. Nothing was fetched; do not "
                "trust this repository."
            )
    missing = [name for name in (CONFIG, WEIGHTS) if name not in names]
    if missing:
        pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
        why = (
            f" Its weights are a pickle ({pickles[0]}), which is never read." if pickles and WEIGHTS in missing else ""
        )
        raise HubError(
            f"'{repo_id}' is not an adapter of adapter-zoo: it has no {' and no '.join(missing)}.{why} It holds: "
            f"{', '.join(names[:8]) or 'nothing'}. Name a repository that `zoo push` wrote."
        )


def _is_intact(path: Path, sibling: Any) -> bool:
    """Whether the file has the hash that the Hub lists: SHA-256 of a large file, git's SHA-1 of a small one."""
    data = path.read_bytes()
    if sibling.lfs is not None:
        return hashlib.sha256(data).hexdigest() == sibling.lfs.sha256
    if sibling.blob_id is not None:
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == sibling.blob_id
    return sibling.size is None or len(data) == sibling.size


def _no_revision(revision: str | None, folder: str | Path) -> None:
    if revision not in (None, "main"):
        raise HubError(
            f"'{folder}' stands for a Hub, but keeps no revisions such as '{revision}'. Leave the revision out."
        )


def _in_folder(hub: Path, repo_id: str) -> Path:
    target = hub / repo_id
    if not (target / CONFIG).exists():
        known = [f"{path.parent.parent.name}/{path.parent.name}" for path in hub.glob(f"*/*/{CONFIG}")]
        raise HubError(f"The folder '{hub}', which stands for a Hub, has no '{repo_id}'. {nearest(repo_id, known)}")
    return target


# -- requests and their failures --------------------------------------------------------------------------------------


def _api(token: str | bool | None) -> HfApi:
    from huggingface_hub import HfApi

    from zoo import __version__

    # The client reads HF_ENDPOINT only when it is imported; here it may also be set later.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    return HfApi(endpoint=endpoint, token=token, library_name="adapter-zoo", library_version=__version__)


def _again(request: Callable[[], T]) -> T:
    """Repeat a request that met a fault of the server or a cut connection."""
    for wait in RETRY_WAITS:
        try:
            return request()
        except Exception as error:
            if not (_status(error) >= 500 or type(error).__name__ in ("ReadError", "WriteError")):
                raise
            _LOG.info("%s; trying again in %s s.", error, wait)
            time.sleep(wait)
    return request()


def _status(error: BaseException) -> int:
    """The HTTP status of an error; 0 if there was no answer."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _is_transport(error: BaseException) -> bool:
    """Whether it comes from the HTTP library below the client (which library depends on the client's version)."""
    return any(cls.__module__.partition(".")[0] in ("httpx", "httpx2", "requests") for cls in type(error).__mro__)


def _is_unreachable(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return (
        isinstance(error, OfflineModeIsEnabled)
        or _status(error) >= 500
        or (_is_transport(error) and not _status(error))
    )


@contextlib.contextmanager
def _explained(
    repo_id: str, revision: str | None, token: str | bool | None, *, writing: bool = False
) -> Iterator[None]:
    """Turn the client's errors into a HubError that says what to do."""
    try:
        yield
    except ZooError:
        raise
    except Exception as error:
        text = _explain(error, repo_id, revision, token, writing)
        if text is None:
            raise
        raise HubError(text) from error


def _explain(
    error: Exception, repo_id: str, revision: str | None, token: str | bool | None, writing: bool
) -> str | None:
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    known = token is not False and bool(token if isinstance(token, str) else get_token())
    login = "Log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, LocalTokenNotFoundError):
        return f"token=True was given, but no token is stored on this machine. {login}."
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    status = _status(error)
    if isinstance(error, GatedRepoError):
        return (
            f"'{repo_id}' is gated: accept its conditions on its page on the Hub, then {login[0].lower()}{login[1:]}."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"'{repo_id}' has no revision '{revision or 'main'}'. Name a branch, a tag or a commit that its page lists."
        )
    if status == 401 and "credentials" in str(error).lower():
        return f"The Hub does not accept the token for '{repo_id}': it is wrong or has expired. {login} again."
    if status == 403:
        what = "write to" if writing else "read"
        return (
            f"The token may not {what} '{repo_id}'. Use a token with the right to {what} it, or your own name in front "
            "of the '/'."
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        if writing and not known:
            return f"Nothing was sent to '{repo_id}', because no token is known. {login}, or pass token=."
        seen = "the token that was used cannot see it" if known else f"no token was sent. {login}, or pass token="
        return f"There is no repository '{repo_id}'; or it is private, and {seen}. Check the spelling of user and name."
    if status == 429:
        return f"The Hub received too many requests from here. Wait a few minutes, then try '{repo_id}' again."
    if status >= 500:
        return f"The Hub failed on '{repo_id}' (status {status}), also when asked again. Nothing was changed; try again later."
    if status:
        return f"The Hub refused '{repo_id}' (status {status}): {_last_line(error)}. Check name, revision and token."
    chain = [error, error.__cause__, error.__context__]
    if any(type(one).__name__ in _BROKEN for one in chain) or "Consistency check failed" in str(error):
        return (
            f"The connection broke off during '{repo_id}'. Nothing half was kept; run it again"
            f"{'' if writing else ' (files that arrived are not fetched twice)'}."
        )
    if _is_unreachable(error) or isinstance(error, LocalEntryNotFoundError):
        kept = "" if writing else ", and it is not in the cache"
        return (
            f"The Hub cannot be reached for '{repo_id}'{kept}. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; a folder "
            "can stand for a Hub (ZOO_HUB_FOLDER)."
        )
    if type(error).__module__.startswith("huggingface_hub") or (
        writing and isinstance(error, (ValueError, RuntimeError))
    ):
        return f"The Hub's client refused '{repo_id}': {error}."
    if isinstance(error, OSError):
        return (
            f"'{repo_id}' could not be {'sent' if writing else 'stored'}: {error}. Check the disk and the cache folder."
        )
    return None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__
