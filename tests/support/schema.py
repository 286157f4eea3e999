"""Whether a document has the keys and types that it needs, and no others."""

from collections.abc import Mapping
from typing import Any


def faults(document: Any, schema: Any, at: str = "") -> list[str]:
    """What is wrong, each with its place; `[]` if nothing is.

    A schema is a type; a set of allowed values; `[schema]` for a list that is not empty; a dict of
    keys to schemas, where a key that ends in "?" may be absent; or a function that tells whether a
    value is right.
    """
    if isinstance(schema, dict):
        if not isinstance(document, Mapping):
            return [f"{at}: {document!r}, expected keys and values"]
        known = {key.removesuffix("?"): of for key, of in schema.items()}
        needed = {key for key in schema if not key.endswith("?")}
        found = [f"{at}: {key!r} is missing" for key in sorted(needed - document.keys())]
        found += [f"{at}: {key!r} is unknown" for key in sorted(document.keys() - known.keys())]
        for key, of in known.items():
            if key in document:
                found += faults(document[key], of, f"{at}.{key}")
        return found
    if isinstance(schema, list):
        if not isinstance(document, list) or not document:
            return [f"{at}: {document!r}, expected a list with something in it"]
        return [f for i, v in enumerate(document) for f in faults(v, schema[0], f"{at}[{i}]")]
    if isinstance(schema, set):
        right = document in schema
    elif isinstance(schema, type):
        right = type(document) is schema  # True is no int
    else:
        right = schema(document)
    return [] if right else [f"{at}: {document!r}, expected {getattr(schema, '__name__', schema)}"]
