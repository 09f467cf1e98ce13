"""The types of what tests/conftest.py gives."""

from collections.abc import Callable
from typing import Any

from tests.support.service import Service

Figure = Callable[[str, object], None]
Start = Callable[..., Service]
Create = Callable[..., dict[str, Any]]
