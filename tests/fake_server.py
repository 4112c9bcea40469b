"""An OpenAI-compatible server without a model, which can be told to fail."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from recbole_gacllm.llm.generator import Request, Sampling

from .fake_generator import FakeGenerator

# What to do with a request: None answers it, a number is the status of a refusal, "drop" closes the
# connection, "garble" sends what is no gzip as such, "trickle" sends a byte now and then without
# end, a dictionary or bytes are sent as they are.
Behaviour = Callable[[dict[str, Any]], "int | str | bytes | dict[str, Any] | None"]


class FakeServer:
    """Listens on a free port of loopback from ``with`` to its end, or to :meth:`stop`.

    Attributes:
        bodies: Every chat request that came, answered or not.
        answered: Contents of the last message of every request that was answered.
        keys: Authorization headers that came.
        retry_after, location: Headers of every refusal.

    Args:
        certificate: File with a key and a certificate; None speaks without TLS.
    """

    retry_after: str | None = None
    location: str | None = None

    def __init__(self, behaviour=None, models=("fake",), certificate=None):
        self.behaviour = behaviour or (lambda body: None)
        self.models = models
        self.bodies = []
        self.answered = []
        self.keys = set()
        self.n_open = self.most_open = 0
        self.lock = threading.Lock()
        fake, generator = self, FakeGenerator(max_model_len=10**6)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                fake.keys.add(self.headers.get("Authorization"))
                self.answer(200, {"data": [{"id": name} for name in fake.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.bodies.append(body)
                    fake.n_open += 1
                    fake.most_open = max(fake.most_open, fake.n_open)
                try:
                    self.complete(body)
                finally:
                    with fake.lock:
                        fake.n_open -= 1

            def complete(self, body):
                told = fake.behaviour(body)
                if told == "drop":
                    self.close_connection = True
                elif told == "garble":
                    self.answer(200, {}, ("Content-Encoding", "gzip"))
                elif told == "trickle":
                    self.trickle()
                elif isinstance(told, dict | bytes):
                    self.answer(200, told)
                elif told is not None:
                    key = self.headers.get("Authorization")
                    headers = {"Retry-After": fake.retry_after, "Location": fake.location}
                    sent = [(name, value) for name, value in headers.items() if value]
                    self.answer(int(told), {"error": f"told to; your key is {key}"}, *sent)
                else:
                    self.answer(200, chat_completion(generator, body))
                    fake.answered.append(body["messages"][-1]["content"])

            def trickle(self):
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                while True:
                    self.wfile.write(b" ")
                    time.sleep(0.05)

            def answer(self, status, content, *headers):
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for header in headers:
                    self.send_header(*header)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *arguments):
                pass  # a client that has gone

        self._server = Server(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        scheme = "http" if certificate is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()

    def stop(self):
        """Stop listening; new connections are refused, as after the death of a server."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def chat_completion(generator, body):
    sampling = Sampling(
        body["max_tokens"], body["temperature"], body["repetition_penalty"], body["seed"]
    )
    made = generator._complete(Request("", tuple(body["messages"]), sampling))
    return {
        "choices": [{"message": {"content": made.text}, "finish_reason": made.finish_reason}],
        "usage": {
            "prompt_tokens": made.n_prompt_tokens,
            "completion_tokens": made.n_output_tokens,
        },
    }
