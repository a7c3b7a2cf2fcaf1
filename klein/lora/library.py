"""Finds the file that a LoRA reference names: below the LoRA folder, or in the Hub's cache."""

import functools
from pathlib import Path

from klein.errors import LoraError
from klein.lora import file, reference
from klein.lora.reference import HubFile, LocalFile, LoraSpec
from klein.settings import Secret


class LoraLibrary:
    """Where LoRAs come from in this deployment."""

    def __init__(self, folder: Path | None, token: Secret | None) -> None:
        self.folder = folder.resolve() if folder else None
        self._token = token

    def find(self, spec: LoraSpec) -> file.LoraFile:
        """The file `spec` names, downloaded if need be; raises LoraError, naming the way out."""
        match reference.parse(spec):
            case LocalFile(name):
                path = self._local(name)
            case HubFile() as hub:
                path = self._hub(hub)
        stat = path.stat()
        return _inspect(path, spec.path, stat.st_mtime_ns, stat.st_size)

    def names(self) -> list[str]:
        """The local LoRAs a request can name."""
        if self.folder is None:
            return []
        found = self.folder.rglob("*.safetensors")
        return sorted(str(path.relative_to(self.folder)) for path in found)

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

    def _hub(self, ref: HubFile) -> Path:
        from huggingface_hub import errors, hf_hub_download

        token = self._token.value if self._token else None
        shown = f"LoRA {ref.repo!r}"
        try:
            name = ref.weight_name or self._only_file(ref, token)
            return Path(hf_hub_download(ref.repo, name, revision=ref.revision, token=token))
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


@functools.lru_cache(maxsize=256)
def _inspect(path: Path, name: str, mtime_ns: int, size: int) -> file.LoraFile:
    """Headers and hashes are read once for each state of a file."""
    return file.inspect(path, name)
