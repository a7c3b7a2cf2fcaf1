"""What images say of themselves: that AI made them, with which parameters, and who signed that.

https://iptc.org/standards/newscodes/digital-source-type/ has the words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from klein import __version__
from klein.core import GenerationResult
from klein.output.c2pa import Signer
from klein.settings import Metadata, Settings

SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DRAWN = "trainedAlgorithmicMedia"
EDITED = "compositeWithTrainedAlgorithmicMedia"

_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 Iptc4xmpExt:DigitalSourceType="{source}"
 xmp:CreatorTool="klein {version}"/>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


class Asked(Protocol):
    """A request or the parameters it led to, as far as they say what an image is made of."""

    @property
    def images(self) -> Sequence[object]:
        """References."""
        ...

    @property
    def init_image(self) -> object | None:
        """The picture that is varied, repainted or extended."""
        ...


def source_type(asked: Asked) -> str:
    """IPTC's word: made by AI from nothing but text, or with a picture of the caller's."""
    return EDITED if asked.images or asked.init_image else DRAWN


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks of a deployment."""

    ai: bool = True
    metadata: Metadata = "full"
    signer: Signer | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> "Marks":
        """Raises BadSetting for a certificate and key that cannot sign."""
        return cls(settings.ai_mark, settings.metadata, Signer.from_settings(settings))

    def xmp(self, asked: Asked) -> bytes:
        """The packet with the digital source type; empty if images carry none."""
        if not self.ai:
            return b""
        source = SOURCE_TYPES + source_type(asked)
        return _XMP.format(source=source, version=__version__).encode()

    def sign(self, data: bytes, mime_type: str, result: GenerationResult) -> bytes:
        """The file with a signed manifest, or as it is where nothing is signed."""
        if self.signer is None:
            return data
        source = SOURCE_TYPES + source_type(result.params)
        is_private = self.metadata != "full"
        return self.signer.sign(data, mime_type, source, result.inputs, is_private=is_private)

    def as_dict(self) -> dict[str, Any]:
        """Which marks are in force."""
        return {"ai": self.ai, "c2pa": self.signer is not None, "metadata": self.metadata}

    def of(self, params: Asked) -> dict[str, Any]:
        """The marks of one result's images."""
        return {**self.as_dict(), "digital_source_type": source_type(params) if self.ai else None}
