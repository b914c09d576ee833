"""Where the objects of s3:// and gs:// addresses are, and how requests for them are signed.

Google's stores take the same signatures, with keys of their own kind: HMAC keys of an account.
Source: AWS, Authenticating Requests: Using the Authorization Header (Signature Version 4).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote, urlsplit

from pagoda_runtime.errors import FatalError

SCHEMES = ("s3://", "gs://")
# Of a request without a body.
_NO_CONTENT = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Bucket:
    """A folder of a bucket; without a key it is asked for as everybody may."""

    url: str
    region: str
    key_id: str | None
    secret: str | None
    session_token: str | None

    @classmethod
    def of(cls, uri: str, environment: Mapping[str, str]) -> Bucket:
        """The folder that uri names, by the variables of AWS' tools, or GS_* for Google's.

        Raises: FatalError: ModelNotFound, uri names no bucket.
        """
        scheme, _, rest = uri.partition("://")
        name, _, path = rest.partition("/")
        if not name:
            raise FatalError(
                "ModelNotFound", f"{uri} names no bucket; write {scheme}://BUCKET/PATH."
            )
        path = quote(f"/{path}".rstrip("/"), safe="/~")
        prefix = "AWS" if scheme == "s3" else "GS"
        endpoint = environment.get(f"{prefix}_ENDPOINT_URL", "").rstrip("/")
        region = "auto"
        if scheme == "s3":
            default = environment.get("AWS_DEFAULT_REGION") or "us-east-1"
            region = environment.get("AWS_REGION") or default
            # A dot would be a host that the certificate of all buckets does not know.
            if not endpoint and "." not in name:
                endpoint, name = f"https://{name}.s3.{region}.amazonaws.com", ""
            endpoint = endpoint or f"https://s3.{region}.amazonaws.com"
        endpoint = endpoint or "https://storage.googleapis.com"
        return cls(
            url=f"{endpoint}/{name}{path}" if name else f"{endpoint}{path}",
            region=region,
            key_id=environment.get(f"{prefix}_ACCESS_KEY_ID"),
            secret=environment.get(f"{prefix}_SECRET_ACCESS_KEY"),
            session_token=environment.get("AWS_SESSION_TOKEN") if scheme == "s3" else None,
        )

    def sign(self, url: str, headers: Mapping[str, str], now: datetime) -> dict[str, str]:
        """The headers of a GET request and those that prove who asks.

        Args:
            now: in UTC; a store refuses what is some minutes off its own clock.
        """
        if not self.key_id or not self.secret:
            return dict(headers)
        parts, time = urlsplit(url), now.strftime("%Y%m%dT%H%M%SZ")
        added = {"x-amz-content-sha256": _NO_CONTENT, "x-amz-date": time}
        if self.session_token:
            added["x-amz-security-token"] = self.session_token
        signed = {name.lower(): value for name, value in headers.items()}
        signed |= {"host": parts.netloc, **added}
        names = ";".join(sorted(signed))
        lines = [f"{name}:{signed[name]}" for name in sorted(signed)]
        request = "\n".join(["GET", parts.path or "/", "", *lines, "", names, _NO_CONTENT])
        scope = [time[:8], self.region, "s3", "aws4_request"]
        what = ["AWS4-HMAC-SHA256", time, "/".join(scope)]
        text = "\n".join([*what, hashlib.sha256(request.encode()).hexdigest()])
        key = f"AWS4{self.secret}".encode()
        for part in (*scope, text):
            key = hmac.digest(key, part.encode(), "sha256")
        credential = f"{self.key_id}/{'/'.join(scope)}"
        added["Authorization"] = (
            f"{what[0]} Credential={credential},SignedHeaders={names},Signature={key.hex()}"
        )
        return {**headers, **added}
