"""Where a bucket's objects are, and how requests for them are signed."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pagoda_runtime.errors import FatalError
from pagoda_runtime.models.buckets import Bucket

EXAMPLE = {
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
}
DAY = datetime(2013, 5, 24, tzinfo=UTC)


def test_a_request_is_signed_as_in_the_example_of_the_specification():
    bucket = Bucket.of("s3://examplebucket", EXAMPLE)
    url = "https://examplebucket.s3.amazonaws.com/test.txt"
    headers = bucket.sign(url, {"Range": "bytes=0-9"}, DAY)
    assert headers["x-amz-date"] == "20130524T000000Z"
    assert headers["Range"] == "bytes=0-9"
    assert headers["Authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
        "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,"
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )


@pytest.mark.parametrize(
    ("uri", "environment", "url"),
    [
        ("s3://b", {}, "https://b.s3.us-east-1.amazonaws.com"),
        ("s3://b/m/", {"AWS_REGION": "eu-west-1"}, "https://b.s3.eu-west-1.amazonaws.com/m"),
        ("s3://a.b/m", {}, "https://s3.us-east-1.amazonaws.com/a.b/m"),
        ("s3://b/m", {"AWS_ENDPOINT_URL": "http://minio:9000/"}, "http://minio:9000/b/m"),
        ("s3://b/a b+c", {}, "https://b.s3.us-east-1.amazonaws.com/a%20b%2Bc"),
        ("gs://b/m", {"AWS_ENDPOINT_URL": "http://x"}, "https://storage.googleapis.com/b/m"),
        ("gs://b/m", {"GS_ENDPOINT_URL": "http://x"}, "http://x/b/m"),
    ],
)
def test_a_folder_of_a_bucket_has_an_address(uri, environment, url):
    assert Bucket.of(uri, environment).url == url


def test_each_kind_of_store_has_keys_of_its_own():
    assert Bucket.of("gs://b/m", EXAMPLE).key_id is None
    assert Bucket.of("gs://b/m", {"GS_ACCESS_KEY_ID": "a"}).key_id == "a"


def test_without_a_key_a_request_is_anybodys():
    assert Bucket.of("s3://b/m", {}).sign("https://x/", {"Range": "r"}, DAY) == {"Range": "r"}


def test_the_token_of_a_session_is_signed_too():
    bucket = Bucket.of("s3://b/m", {**EXAMPLE, "AWS_SESSION_TOKEN": "t"})
    headers = bucket.sign("https://x/", {}, DAY)
    assert headers["x-amz-security-token"] == "t"
    assert "x-amz-date;x-amz-security-token," in headers["Authorization"]


def test_an_address_without_a_bucket_is_refused():
    with pytest.raises(FatalError, match=r"names no bucket; write s3://BUCKET/PATH"):
        Bucket.of("s3:///m", {})
