#!/bin/sh
# openai 3.52.0: `client.chat.completions.parse(response_format=Model)` reads the answer before it hands anything back. Where
# the answer is no JSON of the model (endpoints that take `response_format` and leave it unheeded, as `transformers serve`
# 5.23.0 does, answer so), it raises pydantic's ValidationError, which holds the text and no completion: the tokens that
# were paid for are in no object that the caller can reach. Where it was cut off, LengthFinishReasonError does have them.
# Whoever keeps a budget takes `create` with a JSON schema, counts `usage`, and reads the text afterwards.
#
# Seen: "stop: ValidationError, usage lost" and "length: LengthFinishReasonError, 512 tokens". Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q openai==3.52.0 > /dev/null 2>&1
cd "$folder"
env/bin/python -W ignore - <<'PYTHON'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
from pydantic import BaseModel


class Label(BaseModel):
    label: str


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        finish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": "Once upon a time"}}
        usage = {"prompt_tokens": 50, "completion_tokens": 512, "total_tokens": 562}
        data = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        data = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{server.server_address[1]}/v1", max_retries=0)
seen = []
for finish in ("stop", "length"):
    try:
        client.chat.completions.parse(model=finish, messages=[{"role": "user", "content": "x"}], response_format=Label)
    except Exception as error:
        completion = getattr(error, "completion", None)
        spent = f"{completion.usage.completion_tokens} tokens" if completion is not None else "usage lost"
        seen.append(f"{finish}: {type(error).__name__}, {spent}")
print(*seen, sep="\n")
sys.exit(seen != ["stop: ValidationError, usage lost", "length: LengthFinishReasonError, 512 tokens"])
PYTHON
