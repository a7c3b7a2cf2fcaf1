"""Files that lie elsewhere, by reference: out of the store if they are there, else fetched once."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from klein.sources import safetensors
from klein.sources.cache import Store, age
from klein.sources.civitai import Civitai
from klein.sources.fetch import Fetcher, Offer, Reserve, forget
from klein.sources.hub import Hub
from klein.sources.reference import CivitaiFile, HubFile, RemoteFile, UrlFile
from klein.sources.transport import UNWATCHED, FetchFailed, Watch

FRESH = 300.0
"""Seconds for which what a branch of a Hub repository led to is not asked again."""

HEADER_BYTES = 1024**2
"""What is read of a file first: more than the header of nearly every one."""

Refuse = Callable[[Path], str | None]
"""Looks at a file before it is kept: a sentence on why it is not, or None."""
Promise = Callable[[], Offer]


class Unwanted(FetchFailed):
    """A file that came whole and is not kept; the message is whole too."""


class RemoteFiles:
    """Files of the Hub, of addresses and of Civitai, in one store."""

    def __init__(self, store: Store, fetcher: Fetcher, hub: Hub, civitai: Civitai) -> None:
        self.store = store
        self._fetcher = fetcher
        self._hub = hub
        self._civitai = civitai

    def at_hand(self, ref: RemoteFile) -> Path | None:
        """The file `ref` names, if nothing needs to be asked for it."""
        known = self.store.find(ref.key, ref.sha256 if isinstance(ref, UrlFile) else None)
        if not isinstance(ref, HubFile):
            return known.path if known else None
        settled = ref.is_fixed or self._hub.is_offline
        if known and (settled or age(known.asked) < FRESH):
            return known.path
        return self._hub.cached(ref) if settled else None

    def get(self, ref: RemoteFile, name: str, refuse: Refuse, watch: Watch = UNWATCHED) -> Path:
        """The file `ref` names, fetched if need be; `name` is shown for it in lists.

        Raises FetchFailed, OSError as the disk does, and what `watch` raises.
        """
        if found := self.at_hand(ref):
            self.store.count_hit()
            return found
        if isinstance(ref, HubFile):
            return self._of_hub(ref, name, refuse, watch)
        sha256 = ref.sha256 if isinstance(ref, UrlFile) else None
        return self._fetch(ref.key, name, partial(self._offer, ref, watch), sha256, refuse, watch)

    def header(self, ref: RemoteFile) -> tuple[safetensors.Header, Offer]:
        """The header of a .safetensors file, read without fetching the rest, and the offer it is
        of. Raises FetchFailed, and Damaged for what is no such file."""
        try:
            offer = self._offer(ref, UNWATCHED)
            raw, size = self._fetcher.start(offer, HEADER_BYTES)
            end = 8 + safetensors.header_length(raw, size, 16 * HEADER_BYTES)
            if end > len(raw):
                raw, size = self._fetcher.start(offer, end)
        except FetchFailed as error:
            if isinstance(ref, HubFile):
                raise self._hub.explain(error, ref) from error
            raise
        return safetensors.parse(raw[8:end], size), offer

    def _offer(self, ref: RemoteFile, watch: Watch) -> Offer:
        match ref:
            case HubFile():
                return self._hub.offer(ref, watch)[1]
            case UrlFile(url, sha256):
                return Offer(url, sha256=sha256)
            case CivitaiFile():
                return self._civitai.offer(ref, watch)

    def _of_hub(self, ref: HubFile, name: str, refuse: Refuse, watch: Watch) -> Path:
        """The file of the commit that a branch is at now, or was when the Hub last answered."""
        try:
            fixed, offer = self._hub.offer(ref, watch)
            path = self._hub.cached(fixed)
            if path is None:
                sha256 = offer.sha256
                path = self._fetch(fixed.key, name, lambda: offer, sha256, refuse, watch)
                self.store.link(ref.key, path, name)
            return path
        except Unwanted:
            raise
        except FetchFailed as error:
            known = self.store.find(ref.key)
            if known and error.retryable and not watch.is_over:
                return known.path
            raise self._hub.explain(error, ref) from error

    def _fetch(
        self,
        key: str,
        name: str,
        promise: Promise,
        sha256: str | None,
        refuse: Refuse,
        watch: Watch,
    ) -> Path:
        def fetch(part: Path, reserve: Reserve) -> str | None:
            offer = promise()
            self._fetcher.download(offer, part, watch, reserve)
            if why := refuse(part):
                forget(part)
                raise Unwanted(why)
            return offer.sha256

        return self.store.get(key, fetch, name=name, sha256=sha256, watch=watch)
