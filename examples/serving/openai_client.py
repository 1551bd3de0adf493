"""Ask a running server with OpenAI's client.

    openai_client.py FILE... QUESTION

The files are images and videos. The server is at VITA_SERVER (http://127.0.0.1:8000), its key in
VITA_API_KEY.
"""

import base64
import mimetypes
import os
import sys
from pathlib import Path
from typing import Any

import openai


def media_part(path: str) -> dict[str, Any]:
    """An image or a video as a part of a message."""
    kind = mimetypes.guess_type(path)[0] or "image/png"
    name = "video_url" if kind.startswith("video/") else "image_url"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": name, name: {"url": f"data:{kind};base64,{data}"}}


def main(*files: str, question: str) -> None:
    """Print the answer as it is generated, and the timestamps sampled from videos."""
    client = openai.OpenAI(
        base_url=os.environ.get("VITA_SERVER", "http://127.0.0.1:8000") + "/v1",
        api_key=os.environ.get("VITA_API_KEY") or "none",
    )
    content: Any = [*map(media_part, files), {"type": "text", "text": question}]
    chunks = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=200,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"max_frames": 64},  # an extension: frames of each video
    )
    for chunk in chunks:
        for video in getattr(chunk, "videos", []):
            sys.stdout.write(f"[{len(video['times'])} frames of {video['duration']:.1f} s]\n")
        sys.stdout.write("".join(choice.delta.content or "" for choice in chunk.choices))
        sys.stdout.flush()
        if chunk.usage:
            sys.stdout.write(
                f"\n[{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]\n"
            )


if __name__ == "__main__":
    *files, question = sys.argv[1:] or sys.exit(__doc__)
    main(*files, question=question)
