"""The whole message of an error."""

import pytest


def message(kind, call, *args, **kwargs):
    """What the call says as it raises exactly this kind of error."""
    with pytest.raises(kind) as error:
        call(*args, **kwargs)
    assert type(error.value) is kind
    return str(error.value)
