"""Whether a response is JSON of the asked form, by the package jsonschema.

Called in processes of their own: a schema's regular expressions may run for hours on a hostile response.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

try:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
except ImportError as error:
    raise ImportError("it needs the package jsonschema: pip install 'jsonschema', or '.[json]' here") from error

FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL)


def json_schema(*, response: str, schema: Mapping[str, Any]) -> dict[str, float]:
    """1 when the response is JSON that satisfies `schema` (JSON Schema; 2020-12 where it names none). Of a response
    with fenced blocks, the last one is judged. `is_json`: whether it can be read at all.

    Raises:
        ValueError: `schema` is not a JSON Schema.
    """
    blocks = FENCED.findall(response)
    try:
        value = json.loads(blocks[-1] if blocks else response)
    except (ValueError, RecursionError):
        return {"score": 0.0, "is_json": 0.0}
    return {"score": float(_validator(json.dumps(schema, sort_keys=True)).is_valid(value)), "is_json": 1.0}


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    parsed = json.loads(schema)
    kind = validator_for(parsed, default=Draft202012Validator)
    try:
        kind.check_schema(parsed)
    except SchemaError as error:
        raise ValueError(f"schema: {error.message}") from error
    return kind(parsed)
