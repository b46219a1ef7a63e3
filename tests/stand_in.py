"""A loopback server that stands in for an OpenAI-compatible endpoint."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-not-to-be-written"


class StandIn:
    """A server on this machine that answers what `answer` says; it keeps what it was asked.

    An answer is a text, or a message; the chat `refused` is refused.
    """

    def __init__(self, answer, statuses=()):
        self.answer, self.statuses, self.asked = answer, list(statuses), []
        self.refused = None

    @contextmanager
    def serve(self):
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.asked.append((self.path, self.headers.get("Authorization"), body))
                usual = 400 if body["messages"] == stand_in.refused else 200
                status = stand_in.statuses.pop(0) if stand_in.statuses else usual
                said = stand_in.answer(body["messages"])
                message = said if isinstance(said, dict) else {"content": said}
                reply = {
                    "choices": [{"message": {"role": "assistant", **message}}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10},
                }
                content = json.dumps(reply if status == 200 else {"error": f"key {KEY}"}).encode()
                self.send_response(status)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
