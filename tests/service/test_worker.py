"""What a worker answers when something other than the upscaling fails."""

from __future__ import annotations

from savl.service.worker import Failure, Job, Options, Result, _answer, _Worker


def test_result_that_cannot_be_sent_is_answered_with_a_failure() -> None:
    job = Job(7, b"", Options("png"))
    sent: list[object] = []

    class Finished(_Worker):
        def __init__(self) -> None:
            pass

        def work(self, job: Job) -> Result:
            return Result(job.number, b"large", (1, 1), ())

    def send(message: object) -> None:
        if isinstance(message, Result):
            raise MemoryError
        sent.append(message)

    _answer(Finished(), job, send)
    (failure,) = sent
    assert isinstance(failure, Failure)
    assert (failure.number, failure.kind) == (7, "memory")
