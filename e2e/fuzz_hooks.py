"""What schemathesis is told beside the document: names and ranges that a schema does not have.

Half of the bodies stay as they were made; of the others goes what would be refused before the
route does anything: a model that is not served, and numbers out of their ranges.
"""

from __future__ import annotations

from typing import Any

import schemathesis

_KEPT_NUMBERS = frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens"})
_SMALL = 16


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if not isinstance(body, dict) or len(repr(body)) % 2:
        return body
    mended = {
        name: value
        for name, value in body.items()
        if name not in ("model", "stream_options", "use_beam_search")
        and not isinstance(value, (int, float))
    }
    for name in _KEPT_NUMBERS & body.keys():
        mended[name] = _SMALL
    if isinstance(body.get("stream"), bool):
        mended["stream"] = body["stream"]
    return mended
