"""The end of emberd's tasks: one that misses its cancellation must not keep the next emberd waiting."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from emberd.services.daemon import end_all, run_to_end


async def test_a_task_that_misses_a_cancellation_is_cancelled_again():
    missed = asyncio.Event()

    async def misses_one() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        missed.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(misses_one())
    await asyncio.sleep(0)
    assert await end_all([task], limit_s=0.05) == []
    assert missed.is_set()
    assert task.cancelled()


async def test_a_task_that_never_ends_is_named_and_left():
    stop = asyncio.Event()

    async def stubborn() -> None:
        while not stop.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await stop.wait()

    async def broken() -> None:
        raise ValueError("an error at the end is not worth the end")

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(broken())]
    await asyncio.sleep(0)
    [left] = await end_all(tasks, limit_s=0.05)
    assert left.endswith("stubborn")
    stop.set()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_a_loop_ends_although_a_task_ignores_its_end_and_a_thread_waits():
    released = threading.Event()

    async def stubborn() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    async def work() -> str:
        kept.append(asyncio.create_task(stubborn()))
        asyncio.get_running_loop().run_in_executor(None, released.wait, 60)
        await asyncio.sleep(0)
        return "done"

    kept: list[asyncio.Task[None]] = []
    try:
        assert run_to_end(work(), limit_s=0.01) == "done"
        assert not kept[0].done()
    finally:
        released.set()
