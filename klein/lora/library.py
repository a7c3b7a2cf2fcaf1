"""The LoRAs of a deployment: finds what a reference names, lists, adds and removes."""

import functools
import hashlib
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from klein.errors import InvalidRequest, LoraError
from klein.lora import file
from klein.lora.file import LoraDefaults, LoraFile
from klein.lora.spec import LoraSpec
from klein.settings import Secret
from klein.sources import reference
from klein.sources.cache import LoraStore
from klein.sources.fetch import MAX_BYTES, Fetcher, FetchFailed, OnBytes, check_size
from klein.sources.reference import CivitaiFile, HubFile, LocalFile, UrlFile

CIVITAI = "https://civitai.com"
_NAME = re.compile(r"^[\w][\w .+-]{0,120}\.safetensors$")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Keys to what is not public."""

    hugging_face: Secret | None = None
    civitai: Secret | None = None


def no_progress(_: int, __: int | None) -> None:
    """For callers that do not watch."""


class LoraLibrary:
    """Where LoRAs come from: a folder, the Hub, addresses and Civitai."""

    def __init__(
        self,
        folder: Path | None,
        store: LoraStore | None = None,
        fetcher: Fetcher | None = None,
        tokens: Tokens | None = None,
        civitai: str = CIVITAI,
    ) -> None:
        self.folder = folder.resolve() if folder else None
        self._store = store
        self._fetcher = fetcher or Fetcher()
        self._tokens = tokens or Tokens()
        self._civitai = civitai

    def find(self, spec: LoraSpec, on_bytes: OnBytes = no_progress) -> LoraFile:
        """The file `spec` names, fetched if need be; raises LoraError, naming the way out."""
        match reference.parse(spec.path, spec.weight_name, spec.revision):
            case LocalFile(name):
                path = self._local(name)
            case HubFile() as hub:
                path = self._hub(hub)
            case UrlFile() as url:
                path = self._url(url, on_bytes)
            case CivitaiFile(version):
                path = self._civitai_version(version, on_bytes)
        return _known(path, reference.redacted(spec.path))

    def entries(self) -> list[dict[str, Any]]:
        """Every LoRA at hand, local ones first; a file that cannot be used says why."""
        local = [(name, "folder", self._local(name)) for name in self.names()]
        fetched = self._store.refs().items() if self._store else ()
        rows = [*local, *((reference.redacted(ref), "fetched", path) for ref, path in fetched)]
        return [_row(name, source, path) for name, source, path in rows]

    def names(self) -> list[str]:
        """The local LoRAs a request can name."""
        if self.folder is None:
            return []
        found = self.folder.rglob("*.safetensors")
        inside = (path for path in found if path.resolve().is_relative_to(self.folder))
        return sorted(str(path.relative_to(self.folder)) for path in inside)

    def add(self, name: str, chunks: Iterable[bytes]) -> dict[str, Any]:
        """Write an uploaded file into the folder under `name`; refused if it is no usable LoRA."""
        target = self._new(name)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            size = 0
            with part.open("xb") as out:
                for chunk in chunks:
                    size += len(chunk)
                    if size > MAX_BYTES:
                        raise LoraError(f"LoRA {name!r} is larger than {MAX_BYTES} bytes")
                    out.write(chunk)
            file.inspect(part, name)
            part.replace(target)
        except OSError as error:
            raise LoraError(f"LoRA {name!r} cannot be written ({error.strerror})") from error
        finally:
            part.unlink(missing_ok=True)
        return _row(name, "folder", target)

    def add_reference(
        self, spec: LoraSpec, name: str | None, on_bytes: OnBytes = no_progress
    ) -> dict[str, Any]:
        """Copy what `spec` names into the folder, as `name` or under its own."""
        found = self.find(spec, on_bytes)
        own = re.sub(r"[^\w.+-]+", "-", Path(found.name).name).strip("-")
        name = name or (own if own.endswith(".safetensors") else f"{own}.safetensors")
        with found.path.open("rb") as source:
            return self.add(name, iter(functools.partial(source.read, 1 << 20), b""))

    def remove(self, name: str) -> None:
        """Delete a local LoRA and its card; raises LoraError if there is none."""
        path = self._local(name)
        try:
            path.unlink()
        except OSError as error:
            raise LoraError(f"LoRA {name!r} cannot be deleted ({error.strerror})") from error
        path.with_suffix(".toml").unlink(missing_ok=True)

    # -- where files come from -----------------------------------------------------------------

    def _new(self, name: str) -> Path:
        if self.folder is None:
            raise LoraError("no folder for local LoRAs is set; start klein with KLEIN_LORA_DIR")
        if not _NAME.match(name):
            raise InvalidRequest(
                f"name: {name!r} must be a plain file name that ends in .safetensors", field="name"
            )
        if (self.folder / name).exists():
            raise InvalidRequest(
                f"name: there is a LoRA {name!r} already; delete it first", field="name"
            )
        return self.folder / name

    def _local(self, name: str) -> Path:
        if self.folder is None:
            raise LoraError(
                f"LoRA {name!r}: no folder for local LoRAs is set; start klein with KLEIN_LORA_DIR"
            )
        path = (self.folder / name).resolve()
        if Path(name).is_absolute() or not path.is_relative_to(self.folder):
            raise LoraError(f"LoRA {name!r} lies outside the LoRA folder; name it relative to that")
        if not path.is_file():
            there = ", ".join(self.names()[:10]) or "no LoRA"
            raise LoraError(f"LoRA {name!r} is not in the LoRA folder, which holds {there}")
        return path

    def _url(self, ref: UrlFile, on_bytes: OnBytes) -> Path:
        return self._fetch(ref.url, ref.url, {}, ref.sha256, on_bytes)

    def _civitai_version(self, version: int, on_bytes: OnBytes) -> Path:
        token = self._tokens.civitai
        headers = {"authorization": f"Bearer {token.value}"} if token else {}
        shown = f"LoRA civitai:{version}"
        try:
            facts = self._fetcher.json(f"{self._civitai}/api/v1/model-versions/{version}", headers)
            files = [f for f in facts["files"] if str(f["name"]).endswith(".safetensors")]
            chosen = next((f for f in files if f.get("primary")), files[0] if files else None)
            if chosen is None:
                raise LoraError(f"{shown} has no .safetensors file")
            url = str(chosen["downloadUrl"])
            sha256 = str(chosen.get("hashes", {}).get("SHA256", "")).lower() or None
        except FetchFailed as error:
            raise LoraError(f"{shown}: {error}; private files need CIVITAI_TOKEN") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise LoraError(f"{shown}: Civitai's answer was not understood") from error
        return self._fetch(f"civitai:{version}", url, headers, sha256, on_bytes)

    def _fetch(
        self, ref: str, url: str, headers: dict[str, str], sha256: str | None, on_bytes: OnBytes
    ) -> Path:
        if self._store is None:
            raise LoraError(f"LoRA {reference.redacted(ref)!r}: this klein fetches no LoRAs")

        def fetch(part: Path) -> None:
            self._fetcher.download(url, part, headers, on_bytes)
            try:
                _verify(part, ref, sha256)
            except LoraError:
                part.unlink()
                raise

        try:
            return self._store.get(ref, fetch)
        except FetchFailed as error:
            raise LoraError(f"LoRA {reference.redacted(ref)!r}: {error}") from error
        except OSError as error:
            raise LoraError(
                f"LoRA {reference.redacted(ref)!r} cannot be stored ({error.strerror})"
            ) from error

    def _hub(self, ref: HubFile) -> Path:
        from huggingface_hub import errors

        secret = self._tokens.hugging_face
        token = secret.value if secret else None
        shown = f"LoRA {ref.repo!r}"
        try:
            name = ref.weight_name or self._only_file(ref, token)
            return _hub_file(ref, name, token)
        except FetchFailed as error:
            raise LoraError(f"{shown}: {error}") from error
        except errors.GatedRepoError as error:
            raise LoraError(
                f"{shown} is gated: accept its terms on the Hub and set HF_TOKEN"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise LoraError(
                f"{shown} is not on the Hub, or private: check the name, set HF_TOKEN"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise LoraError(f"{shown} has no revision {ref.revision!r}") from error
        except errors.LocalEntryNotFoundError as error:
            raise LoraError(f"{shown} is not in the cache and the Hub cannot be reached") from error
        except errors.EntryNotFoundError as error:
            raise LoraError(f"{shown} has no file {ref.weight_name!r}") from error
        except LoraError:
            raise
        except Exception as error:  # the Hub's client has changed its HTTP library before
            raise LoraError(
                f"{shown} could not be fetched from the Hub ({type(error).__name__})"
            ) from error

    def _only_file(self, ref: HubFile, token: str | None) -> str:
        from huggingface_hub import HfApi

        info = HfApi(token=token).model_info(ref.repo, revision=ref.revision, timeout=15)
        names = [entry.rfilename for entry in info.siblings or ()]
        weights = [name for name in names if name.endswith(".safetensors")]
        if len(weights) != 1:
            found = ", ".join(weights) or "none"
            raise LoraError(
                f"LoRA {ref.repo!r}: name one of its .safetensors files as weight_name ({found})"
            )
        return weights[0]


def _hub_file(ref: HubFile, name: str, token: str | None) -> Path:
    """The file in the Hub's cache, put there if need be.

    Its size is asked first: one request more for a download, none for a file that is there. Raises
    FetchFailed when it is too large, or untold, since the Hub's client would fetch that without a
    bound; and whatever that client raises.
    """
    from huggingface_hub import hf_hub_download

    offer = hf_hub_download(ref.repo, name, revision=ref.revision, token=token, dry_run=True)
    path = Path(offer.local_path)
    if path.exists():
        return path
    if offer.will_download:
        if offer.file_size is None:
            raise FetchFailed(f"the Hub tells no size of {name!r}: name its https address instead")
        check_size("the Hub", offer.file_size)
    return Path(hf_hub_download(ref.repo, name, revision=ref.revision, token=token))


def card(path: Path) -> LoraDefaults:
    """The defaults kept beside a LoRA: `scale` and `trigger` in a .toml file of the same name."""
    beside = path.with_suffix(".toml")
    if not beside.exists():
        return LoraDefaults()
    try:
        stored = tomllib.loads(beside.read_text())
        scale, trigger = stored.pop("scale", None), stored.pop("trigger", None)
        if (
            stored
            or not isinstance(scale, int | float | None)
            or not isinstance(trigger, str | None)
        ):
            raise ValueError("only scale (a number) and trigger (a text) belong there")
    except (OSError, ValueError) as error:
        raise LoraError(f"{beside.name}: {error}") from error
    return LoraDefaults(None if scale is None else float(scale), trigger)


def _verify(part: Path, ref: str, sha256: str | None) -> None:
    """Refuse what is not the promised content, or no LoRA at all, before it is kept."""
    if sha256:
        with part.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != sha256:
            raise LoraError(f"LoRA {reference.redacted(ref)!r} has another sha256 than promised")
    file.inspect(part, reference.redacted(ref))


def _known(path: Path, name: str) -> LoraFile:
    stat = path.stat()
    found = _inspect(path, name, stat.st_mtime_ns, stat.st_size)
    return replace(found, defaults=card(path))


@functools.lru_cache(maxsize=256)
def _inspect(path: Path, name: str, mtime_ns: int, size: int) -> LoraFile:
    """Headers and hashes are read once for each state of a file."""
    return file.inspect(path, name)


def _row(name: str, source: str, path: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "source": source, "bytes": path.stat().st_size}
    try:
        return row | describe(_known(path, name))
    except LoraError as error:
        return row | {"error": str(error)}


def describe(found: LoraFile) -> dict[str, Any]:
    """What is known of a file, for people and for JSON."""
    return {
        "sha256": found.sha256,
        "format": found.format,
        "base": found.base,
        "rank": found.rank,
        "layers": len(found.patches),
        "trigger_words": list(found.trigger_words),
        "defaults": asdict(found.defaults),
        "training": dict(found.training),
    }
