"""The server, attacked: each line of what a local service must hold against."""

import asyncio
import gc
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

from decomp_jax.errors import UserError
from decomp_jax.room import http
from decomp_jax.room.session import Answer

TOKEN = "t" * 43
OWN = "http://127.0.0.1:1234"
SIGNED = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


class FakeRoom:
    """Stands in for `session.Room`: answers with what was asked; `hold` keeps it busy."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.asked: list[Any] = []

    def warm_up(self) -> list[Callable]:
        return []

    def about(self) -> Answer:
        return Answer({"slices": 3})

    def ask(self, request: Any) -> Answer:
        self.free.wait(200)
        self.asked.append(request)
        return Answer({"asked": request}, {"why": np.arange(3, dtype=">f4")})

    def look(self, request: Any) -> Answer:
        if request.get("image") == "broken":
            raise ZeroDivisionError("patient Meyer")
        raise UserError("image: choose another")

    def thumbnails(self, rows: Any) -> Answer:
        return Answer({"rows": rows})

    def bring(self, data: bytes) -> Answer:
        return Answer({"bytes": len(data)})

    def patients(self, request: Any) -> Answer:
        return Answer({"patients": []})

    slices, paint, ask_patients, slice_of = patients, ask, ask, ask


@pytest.fixture
def room() -> FakeRoom:
    return FakeRoom()


@pytest.fixture
def client(room: FakeRoom) -> Iterator[TestClient]:
    with TestClient(http.make_app(room, TOKEN), base_url=OWN, raise_server_exceptions=False) as client:
        yield client


def unpack(body: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """An answer of the server, read as its docstring says."""
    length, = struct.unpack("<I", body[:4])
    head, at, arrays = json.loads(body[4:4 + length]), 4 + length, {}
    for array in head["arrays"]:
        kind, count = np.dtype("<" + array["type"]), int(np.prod(array["shape"]))
        arrays[array["name"]] = np.frombuffer(body, kind, count, at).reshape(array["shape"])
        at += -(-count * kind.itemsize // 4) * 4
    assert at == len(body)
    return head["data"], arrays


def test_an_answer_is_data_and_little_endian_arrays(client: TestClient) -> None:
    answer = client.post("/api/ask", json={"a": "ü"}, headers=SIGNED)
    data, arrays = unpack(answer.content)
    assert data == {"asked": {"a": "ü"}}
    np.testing.assert_array_equal(arrays["why"], [0, 1, 2])


@pytest.mark.parametrize("token", [None, "", "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", TOKEN, "Bearer ü"])
@pytest.mark.parametrize("path", ["about", "ask", "bring", "nothing"])
def test_without_the_token_nothing_is_told(client: TestClient, room: FakeRoom, token: str | None, path: str) -> None:
    headers = {} if token is None else {"Authorization": token.encode()}
    for method in ("GET", "POST", "PUT"):
        answer = client.request(method, f"/api/{path}", headers=headers)
        assert answer.status_code == 401 and "slices" not in answer.text
    assert not room.asked


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:1234", "[::1]", "0.0.0.0", ""],
)
@pytest.mark.parametrize("path", ["/", "/main.js", "/api/about"])
def test_a_foreign_host_is_refused(client: TestClient, host: str, path: str) -> None:
    assert client.get(path, headers={**SIGNED, "Host": host}).status_code == 400


@pytest.mark.parametrize("origin", [
    "http://evil.example", "null", "https://127.0.0.1:1234", "http://127.0.0.1:9999", "http://localhost:1234",
])
def test_a_foreign_origin_is_refused(client: TestClient, room: FakeRoom, origin: str) -> None:
    answer = client.post("/api/ask", json={}, headers={**SIGNED, "Origin": origin})
    assert answer.status_code == 403 and not room.asked
    assert client.post("/api/ask", json={}, headers={**SIGNED, "Origin": OWN}).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
@pytest.mark.parametrize("path", ["/", "/main.js", "/api/about"])
def test_a_fetch_by_another_site_is_refused(client: TestClient, site: str, path: str) -> None:
    assert client.get(path, headers={**SIGNED, "Sec-Fetch-Site": site}).status_code == 403
    assert client.get(path, headers={**SIGNED, "Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_no_page_of_another_origin_may_read(client: TestClient) -> None:
    answer = client.options("/api/ask", headers={
        "Origin": "http://evil.example", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    })
    assert answer.status_code == 403
    for answer in (answer, client.get("/api/about", headers=SIGNED)):
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""])
def test_bodies_that_a_form_can_send_are_refused(client: TestClient, room: FakeRoom, kind: str) -> None:
    for method, path in (("POST", "ask"), ("PUT", "bring")):
        answer = client.request(method, f"/api/{path}", content=b"{}", headers={**SIGNED, "Content-Type": kind})
        assert answer.status_code == 415
    assert not room.asked


@pytest.mark.parametrize("path", ["/", "/main.js", "/api/about", "/nothing", "/api/nothing"])
def test_every_answer_has_the_headers(client: TestClient, path: str) -> None:
    headers = client.get(path, headers=SIGNED).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", [
    "/../http.py", "/%2e%2e/http.py", "/..%2fhttp.py", "/static/main.js", "//etc/passwd", "/http.py",
    "/main.js/../http.py", "/%2fetc%2fpasswd", "/main.js%00.html",
])
def test_no_other_file_is_given(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (400, 404)


def test_all_files_of_the_page_are_listed_and_there() -> None:
    assert {path.name for path in http.STATIC.iterdir()} == set(http.PAGE)


@pytest.mark.parametrize("said", [True, False])
def test_a_body_too_large_is_refused(client: TestClient, room: FakeRoom, said: bool) -> None:
    pieces = (b"x" * 2**20 for _ in range(65))
    content = pieces if not said else b"".join(pieces)
    answer = client.put("/api/bring", content=content, headers={**SIGNED, "Content-Type": "application/octet-stream"})
    assert answer.status_code == 413
    assert client.post("/api/ask", content=b" " * (http.MOST_JSON + 1), headers=SIGNED).status_code == 413
    assert not room.asked


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"[" * 100_000, b"\xff", b'{"a": 1e999'])
def test_what_is_no_json_object_is_told(client: TestClient, room: FakeRoom, body: bytes) -> None:
    answer = client.post("/api/ask", content=body, headers=SIGNED)
    assert answer.status_code == 400 and "JSON" in answer.json()["error"] and not room.asked


def test_a_request_that_fails_leaves_the_others(client: TestClient, capsys: pytest.CaptureFixture) -> None:
    answer = client.post("/api/look", json={"image": "broken"}, headers=SIGNED)
    assert answer.status_code == 500 and "others can be asked" in answer.json()["error"]
    logged = capsys.readouterr()
    assert "ZeroDivisionError" in logged.err and "Meyer" not in logged.err + logged.out + answer.text
    mistake = client.post("/api/look", json={}, headers=SIGNED)
    assert mistake.status_code == 400 and mistake.json() == {"error": "image: choose another"}
    assert client.post("/api/ask", json={}, headers=SIGNED).status_code == 200


def asking(room: FakeRoom, attack: Callable[[httpx2.AsyncClient], Any]) -> Any:
    """What a coroutine finds that asks the server within one loop."""
    async def run() -> Any:
        transport = httpx2.ASGITransport(http.make_app(room, TOKEN))
        async with httpx2.AsyncClient(transport=transport, base_url=OWN, headers=SIGNED, timeout=200) as client:
            return await attack(client)
    return asyncio.run(run())


def test_of_a_hundred_questions_none_is_lost(room: FakeRoom) -> None:
    """Those that the queue takes are answered, each its own; the others are told to come again."""
    async def attack(client: httpx2.AsyncClient) -> Any:
        room.free.clear()
        tasks = [asyncio.create_task(client.post("/api/ask", json={"n": n})) for n in range(100)]
        while sum(task.done() for task in tasks) < 100 - http.MOST_WAITING:
            await asyncio.sleep(0.01)
        room.free.set()
        answers = await asyncio.gather(*tasks)
        return answers, await client.post("/api/ask", json={"n": 100})

    answers, after = asking(room, attack)
    kept = [n for n, answer in enumerate(answers) if answer.status_code == 200]
    assert len(kept) == http.MOST_WAITING and [unpack(answers[n].content)[0]["asked"]["n"] for n in kept] == kept
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {429} and refused[0].headers["retry-after"]
    assert len(room.asked) == http.MOST_WAITING + 1 and after.status_code == 200


def test_a_newer_question_of_a_page_takes_the_place_of_the_older(room: FakeRoom) -> None:
    async def attack(client: httpx2.AsyncClient) -> Any:
        room.free.clear()
        first = asyncio.create_task(client.post("/api/ask", json={"n": -1}))  # under way
        await asyncio.sleep(0.1)
        tasks = [asyncio.create_task(client.post("/api/ask", json={"n": n}, headers={"X-Page": "ab"[n % 2]}))
                 for n in range(30)]
        await asyncio.sleep(0.3)
        room.free.set()
        return await asyncio.gather(first, *tasks)

    first, *answers = asking(room, attack)
    assert first.status_code == 200
    assert [answer.status_code for answer in answers] == [409] * 28 + [200] * 2
    assert [request["n"] for request in room.asked] == [-1, 28, 29]


def test_two_pages_are_answered_each_its_own(room: FakeRoom) -> None:
    async def attack(client: httpx2.AsyncClient) -> Any:
        async def page(name: str) -> list[dict]:
            headers = {"X-Page": name}
            answers = [await client.post("/api/ask", json={"n": n, "page": name}, headers=headers) for n in range(10)]
            return [unpack(answer.content)[0]["asked"] for answer in answers]
        return await asyncio.gather(page("a"), page("b"))

    for name, answers in zip("ab", asking(room, attack)):
        assert answers == [{"n": n, "page": name} for n in range(10)]


def test_what_a_client_that_left_has_asked_is_not_computed(room: FakeRoom) -> None:
    async def leave(app: Any) -> list[dict]:
        sent, messages = [], [{"type": "http.request", "body": b'{"left": true}', "more_body": False}]

        async def receive() -> dict:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)
        headers = [(b"host", b"127.0.0.1:1234"), *((k.lower().encode(), v.encode()) for k, v in SIGNED.items())]
        await app({"type": "http", "method": "POST", "path": "/api/ask", "raw_path": b"/api/ask", "query_string": b"",
                   "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "",
                   "server": ("127.0.0.1", 1234), "client": ("127.0.0.1", 9)}, receive, send)
        return sent

    async def attack(client: httpx2.AsyncClient) -> Any:
        room.free.clear()
        first = asyncio.create_task(client.post("/api/ask", json={"n": 1}))
        await asyncio.sleep(0.1)
        await leave(client._transport.app)
        room.free.set()
        return await first, await client.post("/api/ask", json={"n": 2})

    assert [answer.status_code for answer in asking(room, attack)] == [200, 200]
    assert room.asked == [{"n": 1}, {"n": 2}]


def test_lists_do_not_wait_for_computations(room: FakeRoom) -> None:
    async def attack(client: httpx2.AsyncClient) -> Any:
        room.free.clear()
        first = asyncio.create_task(client.post("/api/ask", json={}))
        await asyncio.sleep(0.1)
        try:
            return [(await client.post(f"/api/{path}", json={})).status_code for path in ("patients", "slices")]
        finally:
            room.free.set()
            await first

    assert asking(room, attack) == [200, 200]


def test_what_fails_after_a_while_is_not_told_in_the_log(room: FakeRoom, capsys: pytest.CaptureFixture) -> None:
    def fail(_: Any) -> None:
        time.sleep(3 * http.LOOK_FOR_CLIENT)
        raise ValueError("patient Meyer")
    room.look = fail

    async def attack(client: httpx2.AsyncClient) -> Any:
        answer = await client.post("/api/look", json={})
        gc.collect()
        return answer

    assert asking(room, attack).status_code == 500
    assert "Meyer" not in capsys.readouterr().err


def test_until_the_archive_is_laid_out_the_page_is_told_so(room: FakeRoom) -> None:
    free = threading.Event()
    room.warm_up = lambda: [free.wait, free.wait]
    with TestClient(http.make_app(room, TOKEN), base_url=OWN) as client:
        assert client.get("/api/about", headers=SIGNED).json() == {"ready": False, "done": 0, "steps": 2}
        free.set()
        while not (known := client.get("/api/about", headers=SIGNED).json())["ready"]:
            pass
        assert known["slices"] == 3


def test_memory_is_given_back_after_an_answer(
    room: FakeRoom, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = threading.Event()
    monkeypatch.setattr(http, "give_back_host_memory", lambda: room.asked and given.set())
    assert client.post("/api/ask", json={}, headers=SIGNED).status_code == 200
    assert given.wait(200)
