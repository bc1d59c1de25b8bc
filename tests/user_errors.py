"""Errors of users, of which each must be one line."""

import json

import pytest

from lavin.runtime.errors import UserError


def error_message(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_json(path, changes: dict) -> None:
    """Set entries of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
