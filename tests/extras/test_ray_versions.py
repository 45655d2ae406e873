import pytest

from mnist_ray import ray_versions


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The version of Ray, in a list."""
    version = ["2.60.0"]
    monkeypatch.setattr(ray_versions, "ray_version", lambda: version[0])
    return version


def test_versions_are_compared_as_numbers(version: list[str]) -> None:
    for version[0], is_later in {"2.51.2": True, "2.51.0rc1": True, "2.9.3": False, "3.0.0.dev0": True}.items():
        assert ray_versions.is_at_least("2.51") == is_later


def test_an_older_ray_knows_of_no_preemption(version: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    version[0] = "2.59.0"
    monkeypatch.delattr("ray.train.get_preemption_info", raising=False)
    assert ray_versions.preemption_info() is None


def test_a_local_ray_must_be_asked_for_a_token_before_it_is_the_default(version: list[str]) -> None:
    for version[0], must_ask in {"2.51.2": False, "2.55.1": True, "2.60.0": False}.items():
        assert ray_versions.must_ask_for_tokens() == must_ask
