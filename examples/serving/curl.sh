#!/usr/bin/env bash
# Asks a running server about an image, and shows the answer as it comes: curl.sh IMAGE [QUESTION]
# The server is at $VITA_SERVER (http://127.0.0.1:8000); its key, if it has one, is $VITA_API_KEY.
set -euo pipefail

image=${1:?usage: curl.sh IMAGE [QUESTION]}
question=${2:-What is in this picture?}
server=${VITA_SERVER:-http://127.0.0.1:8000}
key=(-H "Authorization: Bearer ${VITA_API_KEY:-none}")

model=$(curl -fsS "${key[@]}" "$server/v1/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')

python3 - "$model" "$image" "$question" <<'PYTHON' |
import base64, json, pathlib, sys
model, image, question = sys.argv[1:]
url = "data:image/png;base64," + base64.b64encode(pathlib.Path(image).read_bytes()).decode()
parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
json.dump({"model": model, "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 200,
           "stream": True}, sys.stdout)
PYTHON
    curl -fsSN "${key[@]}" -H "Content-Type: application/json" --data-binary @- "$server/v1/chat/completions"
