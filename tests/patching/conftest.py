"""Fixtures of more than one file."""

import pytest

from fastlora.modules.lazy_logits import Product


@pytest.fixture
def computed(monkeypatch):
    """How often logits were computed."""
    calls = []
    original = Product.compute
    monkeypatch.setattr(Product, "compute", lambda self: calls.append(1) or original(self))
    return calls
