"""The types of the fixtures in tests/conftest.py that are functions."""

from collections.abc import Callable
from typing import Any

from tests.support.service import Service

Figure = Callable[[str, object], None]
Start = Callable[..., Service]
Create = Callable[..., dict[str, Any]]
