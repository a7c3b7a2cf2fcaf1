"""How JSON answers carry pictures: in themselves, or as links into the operator's bucket."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from klein.errors import BadSetting, DeliveryFailed, DeliveryRefused
from klein.settings import Secret, Settings

CONNECT_SECONDS = 5
READ_SECONDS = 10
"""Until the bucket answers a picture that it has whole, or takes the next bytes of one."""
TRIES = 3


@dataclass(frozen=True, slots=True)
class Bucket:
    """An S3-compatible bucket. Links are presigned and valid for `expiry` seconds."""

    endpoint: str
    name: str
    key_id: Secret
    secret: Secret
    expiry: int
    region: str = "auto"

    @classmethod
    def from_settings(cls, settings: Settings) -> "Bucket | None":
        """The bucket of the settings, None if none is set; raises BadSetting for half of one."""
        parts = {
            "KLEIN_S3_ENDPOINT": settings.s3_endpoint,
            "KLEIN_S3_BUCKET": settings.s3_bucket,
            "KLEIN_S3_KEY_ID": settings.s3_key_id,
            "KLEIN_S3_SECRET": settings.s3_secret,
        }
        missing = [name for name, value in parts.items() if value is None]
        if len(missing) == len(parts):
            return None
        endpoint, name = settings.s3_endpoint, settings.s3_bucket
        key_id, secret = settings.s3_key_id, settings.s3_secret
        if endpoint is None or name is None or key_id is None or secret is None:
            raise BadSetting(f"the bucket is half set: {', '.join(missing)} missing")
        return cls(endpoint, name, key_id, secret, settings.s3_expiry, settings.s3_region)

    def put(self, key: str, data: bytes, mime_type: str) -> str:
        """Store `data` and return its link; raises DeliveryFailed, DeliveryRefused where another
        try would end the same. Callable from several threads at once."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            client = _client(self)
            client.put_object(Bucket=self.name, Key=key, Body=data, ContentType=mime_type)
            link: str = client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self.name, "Key": key},
                ExpiresIn=self.expiry,
            )
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            refused = 300 <= status < 500 and status not in (408, 429)
            kind = DeliveryRefused if refused else DeliveryFailed
            why = f"{status}{_code(error.response)}"
            raise kind(f"the bucket {self.name!r} answered {why} to a picture") from error
        except RecursionError as error:  # botocore follows redirects without counting them
            raise DeliveryRefused(
                f"the bucket {self.name!r} redirects without end: look at KLEIN_S3_ENDPOINT and "
                "KLEIN_S3_REGION"
            ) from error
        except (BotoCoreError, ValueError) as error:
            raise DeliveryFailed(
                f"the bucket {self.name!r} did not take the picture ({type(error).__name__})"
            ) from error
        return link


def _code(response: Any) -> str:
    """S3's word for what is wrong, such as RequestTimeTooSkewed, in brackets; empty without one."""
    word = str(response.get("Error", {}).get("Code", ""))
    return f" ({word})" if re.fullmatch(r"[A-Za-z]{1,40}", word) else ""


@lru_cache(maxsize=1)
def _client(bucket: Bucket) -> Any:
    """boto3's client, which threads may share, of a session of its own, which they may not."""
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        endpoint_url=bucket.endpoint,
        aws_access_key_id=bucket.key_id.value,
        aws_secret_access_key=bucket.secret.value,
        region_name=bucket.region,
        config=Config(
            signature_version="s3v4",
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"total_max_attempts": TRIES, "mode": "standard"},
            request_checksum_calculation="when_required",
            s3={"addressing_style": "path"},
        ),
    )
