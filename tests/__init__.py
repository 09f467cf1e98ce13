"""The tests; the README has the command that runs them."""

import pytest

pytest.register_assert_rewrite("tests.support")  # a failed assert there shows its values, as one in a test does
