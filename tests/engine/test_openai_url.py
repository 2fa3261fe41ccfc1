"""A client of OpenAI's HTTP against a server that fails as it is told; the real SGLang's is asked in tests/sglang."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_pz.engine.openai_url import OpenAIServers, Told
from megatron_pz.engine.sglang.faults import ServerBusy, ServerLost, ServerRefused
from megatron_pz.errors import EngineError

CHAT = {"choices": [{"message": {"content": "seven"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
TEXT = {"choices": [{"text": " eight", "finish_reason": "length"}]}
MODELS = {"data": [{"id": "the-model"}]}


@pytest.fixture
def server():
    """A server with `replies` [(status, body)] to be given in turn, and what it `got` [(path, body, key)]."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            made.got.append((self.path, json.loads(body) if body else None, self.headers.get("Authorization")))
            status, reply = made.replies.pop(0)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.replies, made.got, made.url = [], [], f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def client(server, **more):
    return OpenAIServers([server.url + "/v1/"], first_pause_s=0.01, **more)


def test_a_chat_is_one_user_turn_of_the_first_model(server):
    server.replies = [(200, MODELS), (200, CHAT)]
    assert client(server, api_key="k").complete("2+5?", 9, temperature=0.0) == Told("seven", False, 3)
    path, body, key = server.got[1]
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    turn = [{"role": "user", "content": "2+5?"}]
    assert body == {"model": "the-model", "max_tokens": 9, "messages": turn, "temperature": 0.0}


def test_a_completion_is_the_whole_text(server):
    server.replies = [(200, TEXT)]
    assert client(server, api="completions", model="m").complete("a", 4) == Told(" eight", True, 0)
    assert server.got == [("/v1/completions", {"model": "m", "max_tokens": 4, "prompt": "a"}, None)]


def test_a_busy_server_is_asked_again_until_the_tries_are_used_up(server):
    server.replies = [(503, b"wait"), (429, b"wait"), (200, TEXT)]
    assert client(server, api="completions", model="m", tries=3).complete("a", 4).text == " eight"
    server.replies = [(503, b"no room")] * 2
    with pytest.raises(ServerBusy, match="HTTP 503: no room"):
        client(server, model="m", tries=2).complete("a", 4)


def test_a_refusal_is_an_error_at_once(server):
    server.replies = [(401, b"wrong key")]
    with pytest.raises(ServerRefused, match="HTTP 401: wrong key"):
        client(server, model="m").complete("a", 4)
    assert len(server.got) == 1


@pytest.mark.parametrize("reply", [b"<html>", {"choices": []}, {"error": "x"}, {"choices": [{"message": 3}]}])
def test_what_is_no_answer_is_told(server, reply):
    server.replies = [(200, reply)]
    with pytest.raises(EngineError, match=r"/v1/chat/completions answered what is"):
        client(server, model="m").complete("a", 4)


def test_servers_are_asked_in_turn_and_one_that_is_gone_is_passed_over(server):
    server.replies = [(200, TEXT)] * 2
    gone = "http://127.0.0.1:9"
    both = OpenAIServers([gone, server.url], api="completions", model="m", first_pause_s=0.01)
    assert [both.complete("a", 1).text for _ in range(2)] == [" eight"] * 2
    with pytest.raises(ServerLost, match=r"127\.0\.0\.1:9 did not answer"):
        OpenAIServers([gone], model="m", tries=1).complete("a", 1)
