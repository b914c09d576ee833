#!/bin/sh
# Install the locked requirements of an image into /opt/venv, and let it find code in /opt/pagoda.
# Usage: dependencies.sh REQUIREMENTS
set -eu
uv_version=0.13.8
certificates=/etc/ssl/certs/ca-certificates.crt
export UV_CACHE_DIR=/opt/uv-cache SSL_CERT_FILE=$certificates

# The installer goes again in the same step, so that no layer holds it.
python3 -m venv /opt/uv
/opt/uv/bin/pip install --quiet --no-cache-dir --cert "$certificates" "uv==$uv_version"
/opt/uv/bin/uv venv --quiet --python /usr/bin/python3 /opt/venv
/opt/uv/bin/uv pip install --python /opt/venv/bin/python --require-hashes --no-deps \
  --compile-bytecode --requirement "$1"
echo /opt/pagoda > "$(echo /opt/venv/lib/python3*/site-packages)/pagoda.pth"
rm -rf /opt/uv "$UV_CACHE_DIR"
