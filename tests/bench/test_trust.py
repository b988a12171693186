"""The benchmark of what trust costs prints it, and is red where it costs too much."""

import pytest

from bench import trust


@pytest.mark.parametrize(("limit", "status"), [(1000.0, 0), (0.0, 1)])
def test_it_prints_the_time(limit, status, monkeypatch, capsys):
    monkeypatch.setattr(trust, "LIMIT", limit)
    assert trust.main([]) == status
    out = capsys.readouterr().out
    assert "once per forward: " in out and (("RED" in out) == bool(status))
