"""C2PA: a signed manifest in each image, which says that AI made it, and of what.

https://spec.c2pa.org has the format; c2pa-python, the extra `klein[c2pa]`, writes it.
"""

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein import __version__
from klein.core import EditInputs
from klein.errors import BadSetting, InternalError
from klein.settings import Settings

log = logging.getLogger(__name__)

OPTIONS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}
"""The library's: no small copies of pictures in manifests, and no address that a caller's picture
names is asked."""
KLEIN = {"name": "klein", "version": __version__}
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
MIME_TYPES = {b"\x89P": "image/png", b"\xff\xd8": "image/jpeg", b"RI": "image/webp"}
"""Of the pictures that callers can send, by their first two bytes."""
_BOTH = "KLEIN_C2PA_CERT and KLEIN_C2PA_KEY"


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A caller's picture: the one that was varied or repainted, or else a reference."""

    name: str
    data: bytes
    is_parent: bool
    is_private: bool = False

    def as_dict(self) -> dict[str, str]:
        """In C2PA's words."""
        relationship = "parentOf" if self.is_parent else "inputTo"
        told = {"title": self.name, "label": self.name, "relationship": relationship}
        if self.is_private:
            told["description"] = "what it says of itself was left out"
        return told


@dataclass(frozen=True, slots=True, repr=False)
class Signer:
    """A private key in PEM (PKCS #8) and its certificate chain in PEM, the signer's own first."""

    algorithm: str
    key: bytes
    chain: bytes

    @classmethod
    def from_settings(cls, settings: Settings) -> "Signer | None":
        """The signer of the settings, None if none is set; raises BadSetting for half of one, and
        for one that cannot sign."""
        if settings.c2pa_cert is None and settings.c2pa_key is None:
            return None
        if settings.c2pa_cert is None or settings.c2pa_key is None:
            raise BadSetting(f"{_BOTH}: set both or none")
        try:
            import c2pa
        except ImportError as error:
            raise BadSetting(f"{_BOTH} need a package: pip install 'klein[c2pa]'") from error
        chain = _read("KLEIN_C2PA_CERT", settings.c2pa_cert)
        made = cls(*_load_key(_read("KLEIN_C2PA_KEY", settings.c2pa_key)), chain)
        try:
            made._sign(_pixel(), "image/png", "", [])
        except c2pa.C2paError as error:
            raise BadSetting(f"{_BOTH} cannot sign: {error}") from error
        return made

    def sign(
        self,
        data: bytes,
        mime_type: str,
        source_type: str,
        inputs: EditInputs | None,
        *,
        is_private: bool = False,
    ) -> bytes:
        """The image with a manifest; raises InternalError. It takes milliseconds of a CPU.

        `is_private` names the caller's pictures and leaves out what they say of themselves.
        """
        import c2pa

        try:
            return self._sign(data, mime_type, source_type, ingredients(inputs, is_private))
        except c2pa.C2paError as error:
            log.exception("an image could not be signed")
            raise InternalError("the image could not be signed: see klein's log") from error

    def _sign(
        self, data: bytes, mime_type: str, source_type: str, ingredients: list[Ingredient]
    ) -> bytes:
        import c2pa

        info = c2pa.C2paSignerInfo(self.algorithm, self.chain, self.key, None)
        context = c2pa.Context.from_dict(OPTIONS)
        out = io.BytesIO()
        with (
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(_manifest(source_type, ingredients), context) as builder,
        ):
            for ingredient in ingredients:
                _add(builder, ingredient)
            builder.sign(signer, mime_type, io.BytesIO(data), out)
        return out.getvalue()


def ingredients(inputs: EditInputs | None, is_private: bool = False) -> list[Ingredient]:
    """The pictures of an edit under the names of their fields, each once; private ones are one
    blank pixel each."""
    if inputs is None:
        return []
    references = inputs.references[1:] if inputs.repaint else inputs.references
    named = [(f"images.{n}", each.data, False) for n, each in enumerate(references)]
    if inputs.start is not None:
        named.insert(0, ("init_image", inputs.start.data, True))
    blank = _pixel()
    return [
        Ingredient(name, blank if is_private else data, is_parent, is_private)
        for name, data, is_parent in named
    ]


def _manifest(source_type: str, ingredients: list[Ingredient]) -> dict[str, Any]:
    """An image is opened and edited if it has a parent, and else created; nothing is in it that
    the caller wrote."""
    parents = [each.name for each in ingredients if each.is_parent]
    made: dict[str, Any] = {
        "action": "c2pa.edited" if parents else "c2pa.created",
        "digitalSourceType": source_type,
        "softwareAgent": KLEIN,
        "parameters": {"ingredientIds": [each.name for each in ingredients if not each.is_parent]},
    }
    opened = [{"action": "c2pa.opened", "parameters": {"ingredientIds": parents}}]
    actions = {"actions": [*(opened if parents else []), made]}
    return {
        "claim_generator_info": [KLEIN],
        "assertions": [{"label": "c2pa.actions.v2", "data": actions}],
    }


def _add(builder: Any, ingredient: Ingredient) -> None:
    """Name a caller's picture, with the manifest that it has itself if that can be read."""
    import c2pa

    told, mime_type = ingredient.as_dict(), MIME_TYPES[ingredient.data[:2]]
    try:
        builder.add_ingredient(told, mime_type, io.BytesIO(ingredient.data))
    except c2pa.C2paError as error:
        told["description"] = f"its own manifest cannot be read ({error})"
        builder.add_ingredient(told, "image/png", io.BytesIO(_pixel()))


def _pixel() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "PNG")
    return out.getvalue()


def _read(name: str, path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise BadSetting(f"{name}: {path} cannot be read ({error.strerror})", field=name) from error


def _load_key(pem: bytes) -> tuple[str, bytes]:
    """C2PA's name of the key's algorithm, and the key in PKCS #8; raises BadSetting."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadSetting(
            "KLEIN_C2PA_KEY: not a private key in PEM without a password", field="KLEIN_C2PA_KEY"
        ) from error
    if isinstance(key, ec.EllipticCurvePrivateKey):
        algorithm = CURVES.get(key.curve.name, "")
    else:
        kinds = {rsa.RSAPrivateKey: "ps256", ed25519.Ed25519PrivateKey: "ed25519"}
        algorithm = next((name for kind, name in kinds.items() if isinstance(key, kind)), "")
    if not algorithm:
        raise BadSetting(
            "KLEIN_C2PA_KEY: C2PA takes keys of P-256, P-384, P-521, Ed25519 and RSA",
            field="KLEIN_C2PA_KEY",
        )
    pkcs8 = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return algorithm, pkcs8
