"""How JSON answers carry pictures: in themselves, or as links into the operator's bucket."""

from dataclasses import dataclass

from klein.errors import BadSetting, DeliveryFailed
from klein.settings import Secret, Settings


@dataclass(frozen=True, slots=True)
class Bucket:
    """An S3-compatible bucket. Links are presigned and valid for `expiry` seconds."""

    endpoint: str
    name: str
    key_id: Secret
    secret: Secret
    expiry: int

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
        return cls(endpoint, name, key_id, secret, settings.s3_expiry)

    def put(self, key: str, data: bytes, mime_type: str) -> str:
        """Store `data` and return its link; raises DeliveryFailed."""
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            client = boto3.client(
                "s3",
                endpoint_url=self.endpoint,
                aws_access_key_id=self.key_id.value,
                aws_secret_access_key=self.secret.value,
                region_name="auto",
                config=Config(
                    signature_version="s3v4",
                    connect_timeout=10,
                    read_timeout=60,
                    retries={"max_attempts": 3},
                    request_checksum_calculation="when_required",
                    s3={"addressing_style": "path"},
                ),
            )
            client.put_object(Bucket=self.name, Key=key, Body=data, ContentType=mime_type)
            link: str = client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self.name, "Key": key},
                ExpiresIn=self.expiry,
            )
        except (BotoCoreError, ClientError, ValueError) as error:
            raise DeliveryFailed(
                f"the bucket {self.name!r} did not take the picture ({type(error).__name__})"
            ) from error
        return link
