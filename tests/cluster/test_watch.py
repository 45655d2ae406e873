import functools
from concurrent.futures import Future

import pytest

from mnist_ray.cluster import watch
from mnist_ray.cluster.watch import Watch


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    return clock


def test_who_does_not_answer_in_time_is_named_and_who_answers_is_asked_again(clock: Clock) -> None:
    answers: dict[str, list[Future[object]]] = {"prompt": [], "silent": []}

    def ask(name: str) -> Future[object]:
        answers[name].append(Future())
        return answers[name][-1]

    watched = Watch({name: functools.partial(ask, name) for name in answers})
    for second in range(51):
        clock.now = second
        assert watched.silent() is None
        if not answers["prompt"][-1].done():
            answers["prompt"][-1].set_result(None)
    clock.now = 51
    assert watched.silent() == "silent"
    assert (len(answers["prompt"]), len(answers["silent"])) == (11, 1)


def test_an_error_is_a_sign_of_life(clock: Clock) -> None:
    failed: Future[object] = Future()
    failed.set_exception(RuntimeError())
    watched = Watch({"failing": lambda: failed})
    for clock.now in (0, 100, 200):
        assert watched.silent() is None
