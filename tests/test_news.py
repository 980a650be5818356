"""News: who hears of it, and when."""

import asyncio

from cake.news import News


async def test_all_who_wait_hear_of_it_and_who_comes_later_waits_for_the_next() -> None:
    news, heard = News(), list[str]()

    async def hear(name: str) -> None:
        await news.wait(60)
        heard.append(name)

    first = [asyncio.create_task(hear(name)) for name in "ab"]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    news.tell()
    await asyncio.gather(*first)
    assert sorted(heard) == ["a", "b"]
    later = asyncio.create_task(hear("c"))
    await news.wait(0.01)
    assert not later.done()
    news.tell()
    await later


async def test_a_hearer_is_called_at_once_and_only_while_it_listens() -> None:
    news, calls = News(), list[int]()
    with news.heard_by(lambda: calls.append(1)):
        news.tell()
        assert calls == [1]
    news.tell()
    assert calls == [1]
