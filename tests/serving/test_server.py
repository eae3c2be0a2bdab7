"""The server: OpenAI's client against real replies, bad requests, a full queue, clients that go, and its end."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2
import pytest

import llada
from llada.inference.chat import Chat, Options
from llada.inference.replay import displayable
from llada.serving import page, server
from llada.serving.app import make_app
from llada.serving.queue import Queue

openai = pytest.importorskip("openai")

DEFAULTS = Options(gen_length=8)
QUESTION = [{"role": "user", "content": "the cat"}]
PATH = "/v1/chat/completions"


class Gated:
    """A chat whose replies wait while `gate` is shut; `batches` counts the conversations of each call."""

    def __init__(self, chat: Chat):
        self.run, self.check, self.chat = chat.run, chat.check, chat
        self.gate, self.batches, self.ended = threading.Event(), [], []
        self.gate.set()

    def reply(self, conversations, options, observe=None):
        self.batches.append(len(conversations))
        assert self.gate.wait(30)
        try:
            replies = self.chat.reply(conversations, options, observe)
        except Exception as error:
            self.ended.append(type(error).__name__)
            raise
        self.ended.append("")
        return replies


@contextlib.contextmanager
def serving(chat, capacity=64, defaults=DEFAULTS):
    """A server on a thread: its address, its queue and its chat."""
    gated = Gated(chat)
    queue = Queue(gated, capacity)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = threading.Event()
        it = server.Server(make_app(gated, queue, "tiny", defaults), queue, started.set)
        thread = threading.Thread(target=it.run, args=([listener],))
        thread.start()
        assert started.wait(60)
        try:
            yield SimpleNamespace(url=url, queue=queue, chat=gated, thread=thread, server=it)
        finally:
            gated.gate.set()
            it.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def chats(trained):
    return {family: Chat(llada.load(trained[family].workdir)) for family in ("llada", "arm")}


@pytest.fixture(scope="module")
def servers(chats):
    with serving(chats["llada"]) as diffusion, serving(chats["arm"]) as arm:
        yield {"llada": diffusion, "arm": arm}


def client_of(it, **options):
    return openai.OpenAI(base_url=f"{it.url}/v1", api_key="none", max_retries=0, **options)


def until(condition):
    """Wait for what other threads do."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def post(it, body, **options):
    return httpx2.post(it.url + PATH, json=body, timeout=30, **options)


families = pytest.mark.parametrize("family", ["llada", "arm"])


@families
def test_openais_client_gets_the_chats_reply_whole_and_in_pieces(servers, family):
    it = servers[family]
    expected = it.chat.chat.reply([QUESTION], [DEFAULTS], lambda *_: None)[0]
    client = client_of(it)
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8)
    assert whole.choices[0].message.content == expected.text and whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == expected.finish_reason
    used = (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert used == (expected.prompt_tokens, expected.completion_tokens)
    chunks = [
        *client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [{"type": "text", "text": "the cat"}]}],
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    *pieces, last, used = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == expected.text
    assert last.choices[0].finish_reason == expected.finish_reason
    assert used.choices == [] and used.usage == whole.usage and all(chunk.usage is None for chunk in pieces)


def test_choices_seeds_and_stops(servers):
    it = servers["llada"]
    body = {"messages": QUESTION, "temperature": 1, "n": 2}
    replies = [post(it, body | {"seed": seed}).json() for seed in (5, 6, 5)]
    texts = [[choice["message"]["content"] for choice in reply["choices"]] for reply in replies]
    assert texts[0] == texts[2] and texts[0][1] == texts[1][0] and texts[0][0] != texts[0][1]
    assert [reply["llada"]["seeds"] for reply in replies] == [[5, 6], [6, 7], [5, 6]]
    unseeded = [post(it, body).json()["llada"]["seeds"][0] for _ in range(2)]
    assert unseeded[1] == unseeded[0] + 1
    usage, text = replies[0]["usage"], max(texts[0], key=len)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = post(it, body | {"seed": 5, "stop": ["nowhere", stop]}).json()["choices"][texts[0].index(text)]
    assert cut["message"]["content"] == text[: text.index(stop)] and cut["finish_reason"] == "stop"


@families
def test_greedy_replies_are_the_same_with_one_client_and_sixteen(servers, family):
    it = servers[family]
    words = "cat dog bird fish tree stone river cloud".split()
    questions = [" ".join([*words[: 1 + i % 3], words[i % 8]]) for i in range(16)]
    bodies = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    alone = [post(it, body).json()["choices"] for body in bodies]
    it.chat.gate.clear()
    del it.chat.batches[:]
    with ThreadPoolExecutor(17) as pool:
        first = pool.submit(post, it, {"messages": QUESTION})
        until(lambda: it.queue.counts == {"waiting": 0, "running": 1})
        together = [pool.submit(post, it, body) for body in bodies]
        until(lambda: it.queue.counts["waiting"] == 16)
        it.chat.gate.set()
        assert [future.result().json()["choices"] for future in together] == alone
        assert first.result().status_code == 200
    assert it.chat.batches == [1, 16]


@pytest.mark.parametrize("family, seeds, temperature", [("llada", [5, 6], 1.0), ("arm", [0], 0.0)])
def test_the_canvas_of_every_step_and_text_as_soon_as_it_is_final(servers, family, seeds, temperature):
    it = servers[family]
    options = [DEFAULTS._replace(seed=seed, temperature=temperature) for seed in seeds]
    expected = it.chat.chat.reply([QUESTION] * len(seeds), options, lambda *_: None)
    body = {"messages": QUESTION, "n": len(seeds), "seed": seeds[0], "temperature": temperature}
    lines = post(it, body | {"stream": True, "stream_canvas": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    decode = it.chat.run.tokenizer.decode
    for i, reply in enumerate(expected):
        frames = [event["canvas"] for event in events if event.get("canvas", {}).get("index") == i]
        assert [frame["step"] for frame in frames] == [*range(reply.forward_passes)]
        for before, after in itertools.pairwise(frames):
            # What is written stays, and each step says what it wrote.
            pairs = list(zip(before["steps"], after["steps"], strict=True))
            assert {new for old, new in pairs if old != new} == {after["step"]}
            assert all(old is None for old, new in pairs if old != new)
        last = frames[-1]
        assert "".join(last["pieces"][: last["end"]]) == displayable(reply.text)
        assert [-1 if step is None else step for step in last["steps"]] == reply.step[-8:]
        sent = ""
        for event in events:
            sent += "".join(choice["delta"].get("content", "") for choice in event["choices"] if choice["index"] == i)
            if event.get("canvas", {}).get("index") == i:
                steps = event["canvas"]["steps"]
                final = decode(reply.ids[: next((k for k, step in enumerate(steps) if step is None), len(steps))])
                assert sent == final.rstrip("\ufffd")
        assert sent == reply.text
    if family == "llada":  # or nothing was proved
        assert any(reply.step[-8:] != sorted(reply.step[-8:]) for reply in expected)


def test_what_asks_for_nothing_is_accepted(servers):
    it = servers["llada"]
    neutral = {"top_p": 1.0, "presence_penalty": 0, "logprobs": False, "tools": [], "tool_choice": "none", "user": "me"}
    neutral |= {"response_format": {"type": "text"}, "stop": None, "seed": None, "max_completion_tokens": 8, "n": None}
    earlier = client_of(it).chat.completions.create(model="tiny", messages=QUESTION).choices[0].message.model_dump()
    dialogue = [*QUESTION, earlier | {"content": "b"}, {"role": "user", "content": "c"}]
    assert post(it, neutral | {"messages": dialogue}).status_code == 200


BAD = {
    "no JSON": ("{", 400, "is not JSON"),
    "a list": ([], 400, "JSON object"),
    "deep": ("[" * 100_000, 400, "JSON"),
    "digits": ('{"seed": ' + "9" * 5000 + "}", 400, "JSON"),
    "no messages": ({}, 400, "messages is missing"),
    "empty messages": ({"messages": []}, 400, "messages is missing"),
    "messages of text": ({"messages": "hello"}, 400, "messages must be a list"),
    "a message of text": ({"messages": ["hello"]}, 400, "messages[0] must be an object"),
    "no role": ({"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "messages[0].content must be text"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts"),
    "a named message": ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, 400, "'name'"),
    "a surrogate": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "half a surrogate"),
    "an unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "wizard"),
    "no question": ({"messages": [*QUESTION, {"role": "assistant", "content": "x"}]}, 400, "assistant"),
    "a long prompt": (
        {"messages": [{"role": "user", "content": "the cat " * 99}]},
        400,
        "no room for an answer; leave",
    ),
    "another model": ({"model": "gpt-4"}, 404, "this server has 'tiny'"),
    "model 7": ({"model": 7}, 400, "model must be text"),
    "a typo": ({"temprature": 1}, 400, "did you mean temperature?"),
    "an unknown field": ({"zzz": 1}, 400, "there is no field 'zzz'; fields: model"),
    "top_p": ({"top_p": 0.9}, 400, "top_p is not served"),
    "logprobs": ({"logprobs": True}, 400, "logprobs is not served"),
    "logprobs 0": ({"logprobs": 0}, 400, "give false"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools is not served"),
    "json mode": ({"response_format": {"type": "json_object"}}, 400, "response_format is not served"),
    "n=0": ({"n": 0}, 400, "n=0 must be between 1 and 16"),
    "n=17": ({"n": 17}, 400, "n=17"),
    "n=true": ({"n": True}, 400, "n must be a whole number, not True"),
    "max_tokens=0": ({"max_tokens": 0}, 400, "max_tokens=0 must be at least 1"),
    "max_tokens=1.5": ({"max_tokens": 1.5}, 400, "max_tokens must be a whole number"),
    "two lengths": ({"max_tokens": 2, "max_completion_tokens": 3}, 400, "differ"),
    "temperature": ({"temperature": -1}, 400, "temperature=-1.0 must be"),
    "infinite": ('{"temperature": 1e999}', 400, "finite"),
    "seed": ({"seed": -1}, 400, "seed=-1 must be"),
    "last seed": ({"seed": 2**32 - 1, "n": 2}, 400, "seed=4294967296 must be"),
    "steps": ({"steps": 3, "block_length": 4}, 400, "steps=3 must be a positive multiple"),
    "remasking": ({"remasking": "none"}, 400, "remasking=none is not one of"),
    "stream": ({"stream": "yes"}, 400, "stream must be true or false"),
    "stream_options": ({"stream_options": {}}, 400, "for stream=true"),
    "stream_canvas": ({"stream_canvas": True}, 400, "for stream=true"),
    "stop": ({"stop": [""]}, 400, "stop must be"),
    "stops": ({"stop": ["a"] * 17}, 400, "stop must be"),
}


@pytest.mark.parametrize("body, status, reason", BAD.values(), ids=BAD)
def test_bad_requests_get_a_reason_and_no_reply(servers, body, status, reason):
    it = servers["llada"]
    if isinstance(body, dict):
        body = {"messages": QUESTION} | body if body and "messages" not in body else body
    content = body if isinstance(body, str) else json.dumps(body)
    before = len(it.chat.batches)
    response = httpx2.post(it.url + PATH, content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (status, "invalid_request_error")
    assert reason in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and "--" not in error["message"] and "Traceback" not in response.text
    assert len(it.chat.batches) == before


def test_an_arm_refuses_what_is_of_the_reverse_process(servers):
    response = post(servers["arm"], {"messages": QUESTION, "steps": 4})
    assert response.status_code == 400 and "steps needs a diffusion model" in response.json()["error"]["message"]


def test_other_paths_methods_types_and_sizes(servers):
    url = servers["llada"].url
    for method, path, status in [("GET", "/nothing", 404), ("GET", PATH, 405), ("GET", "/v1/models/other", 404)]:
        response = httpx2.request(method, url + path)
        assert response.status_code == status and response.json()["error"]["message"]
    assert httpx2.post(url + PATH, content="{}").status_code == 415
    json_type = {"content-type": "application/json"}
    assert httpx2.post(url + PATH, content=b" " * (1 << 21), headers=json_type).status_code == 413
    # The same without a length that tells before.
    assert httpx2.post(url + PATH, content=iter([b" " * (1 << 19)] * 3), headers=json_type).status_code == 413


def test_pages_of_other_sites_and_other_names_of_this_machine_are_refused(servers):
    url = servers["llada"].url
    port = url.rpartition(":")[2]
    for headers, status in [
        ({"host": f"localhost:{port}"}, 200),
        ({"host": f"[::1]:{port}", "origin": f"http://[::1]:{port}"}, 200),
        ({"origin": url}, 200),
        ({"host": f"evil.example:{port}"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": f"evil.example:{port}", "origin": f"http://evil.example:{port}"}, 403),
    ]:
        response = httpx2.get(f"{url}/v1/models", headers=headers)
        assert response.status_code == status, headers
        assert "access-control-allow-origin" not in response.headers


def test_a_full_queue_refuses_and_recovers(chats):
    with serving(chats["llada"], capacity=2) as it, ThreadPoolExecutor(3) as pool:
        it.chat.gate.clear()
        running = pool.submit(post, it, {"messages": QUESTION})
        until(lambda: it.queue.counts["running"] == 1)
        waiting = [pool.submit(post, it, {"messages": QUESTION, "temperature": 1}) for _ in range(2)]
        until(lambda: it.queue.counts["waiting"] == 2)
        for more in ({}, {"stream": True}):
            refused = post(it, {"messages": QUESTION} | more)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) > 0
        assert httpx2.get(f"{it.url}/health").json() == {"status": "ok", "waiting": 2, "running": 1}
        it.chat.gate.set()
        assert [future.result().status_code for future in [running, *waiting]] == [200] * 3
        assert post(it, {"messages": QUESTION, "n": 3}).status_code == 503  # more than ever fit


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go_away_free_their_slots(chats, stream):
    body = {"messages": QUESTION, "stream": stream}
    with serving(chats["llada"], capacity=1) as it:
        it.chat.gate.clear()
        with leaving(it, body):
            until(lambda: it.queue.counts == {"waiting": 0, "running": 1})
            with leaving(it, body):
                until(lambda: it.queue.counts["waiting"] == 1)
            until(lambda: it.queue.counts["waiting"] == 0)
        until(lambda: all(job.cancelled for job in it.queue._running))
        it.chat.gate.set()
        until(lambda: it.queue.counts["running"] == 0)
        assert it.chat.batches == [1] and it.chat.ended == ["Closed"]  # ended between two steps, since nobody waits
        assert post(it, {"messages": QUESTION}).status_code == 200


@contextlib.contextmanager
def leaving(it, body):
    """A client that sends a request and closes its connection without an answer."""
    content = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(it.url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield


def test_a_failure_is_told_without_its_traceback_and_does_not_end_the_server(chats, monkeypatch, caplog):
    with serving(chats["llada"]) as it:
        monkeypatch.setattr(it.chat.chat.__class__, "reply", lambda *_: 1 / 0)
        response = post(it, {"messages": QUESTION})
        assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
        streamed = post(it, {"messages": QUESTION, "stream": True})
        assert "ZeroDivision" not in response.text + streamed.text and '"error"' in streamed.text
        assert "ZeroDivisionError" in caplog.text
        monkeypatch.undo()
        assert post(it, {"messages": QUESTION}).status_code == 200


def test_stopping_ends_streams_and_waiting_requests_within_seconds(chats):
    with serving(chats["llada"]) as it, ThreadPoolExecutor(2) as pool:
        it.chat.gate.clear()
        stream = pool.submit(post, it, {"messages": QUESTION, "stream": True})
        until(lambda: it.queue.counts["running"] == 1)
        waiting = pool.submit(post, it, {"messages": QUESTION})
        until(lambda: it.queue.counts["waiting"] == 1)
        start = time.monotonic()
        it.server.handle_exit(15, None)
        assert "shutting down" in stream.result().text and waiting.result().status_code == 503
        it.chat.gate.set()
        it.thread.join(8)
        assert not it.thread.is_alive() and time.monotonic() - start < 8 and it.chat.ended == ["Closed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_as_a_success(chats, number):
    answers, users = [], []

    def use(url):
        with contextlib.suppress(Exception):
            answers.append(httpx2.post(url.rstrip("/") + PATH, json={"messages": QUESTION}, timeout=30).status_code)
        os.kill(os.getpid(), number)

    def ready(url):
        users.append(threading.Thread(target=use, args=(url,)))
        users[0].start()

    server.serve(chats["llada"], port=0, defaults=DEFAULTS, ready=ready)
    users[0].join()
    assert answers == [200]


def test_an_address_that_is_taken_is_one_line(chats):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(llada.errors.UserError, match=f"--serve={port}: cannot listen.*in use"):
            server.serve(chats["llada"], port=port)


def test_the_page_needs_nothing_from_elsewhere_and_inserts_text_as_text(servers):
    response = httpx2.get(servers["llada"].url)
    policy, html = response.headers["content-security-policy"], response.text
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.replace("style-src 'unsafe-inline'", "")
    assert (html, policy) == page.page() and "/*SHADES*/" not in html
    assert not re.search(r"https?://|@import|innerHTML|insertAdjacentHTML|document\.write|\beval\b", html)
    assert len(re.findall(r"<script", html)) == 1 and not re.search(r"\son\w+=", html)
