"""Civitai: which file a model version is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from klein.sources.address import Address, BadAddress
from klein.sources.fetch import Fetcher, Offer
from klein.sources.reference import CIVITAI_HOSTS, SUFFIX, CivitaiFile
from klein.sources.transport import FetchFailed, Watch

CIVITAI = "https://civitai.com"


@dataclass(frozen=True, slots=True)
class Civitai:
    """Asks Civitai's API at `address`."""

    fetcher: Fetcher
    token: str | None = None
    address: str = CIVITAI

    def offer(self, file: CivitaiFile, watch: Watch) -> Offer:
        """The version's primary .safetensors file, with the hash it is promised to have.

        Raises FetchFailed. The token goes to Civitai's own hosts and to no other that an answer
        may name.
        """
        url = f"{self.address}/api/v1/model-versions/{file.version}"
        answer = self.fetcher.json(url, self._headers(url), watch)
        try:
            files = [row for row in answer["files"] if str(row["name"]).endswith(SUFFIX)]
            chosen = next((row for row in files if row.get("primary")), files[0] if files else None)
            if chosen is None:
                raise FetchFailed("it has no .safetensors file")
            target = str(chosen["downloadUrl"])
            sha256 = str((chosen.get("hashes") or {}).get("SHA256", "")).lower()
        except (KeyError, TypeError, AttributeError) as error:
            raise FetchFailed("Civitai's answer was not understood") from error
        promised = sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else None
        return Offer(target, self._headers(target), promised)

    def _headers(self, url: str) -> Mapping[str, str]:
        try:
            address, own = Address.parse(url), Address.parse(self.address)
        except BadAddress as error:
            raise FetchFailed("Civitai's answer was not understood") from error
        is_own = (address.scheme, address.netloc) == (own.scheme, own.netloc) or (
            address.scheme == "https" and address.port is None and address.host in CIVITAI_HOSTS
        )
        return {"authorization": f"Bearer {self.token}"} if self.token and is_own else {}
