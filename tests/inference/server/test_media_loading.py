"""Media of requests: data URLs, files under the allowed folders and nowhere else, remote ones from
public addresses."""

import asyncio
import http.server
import ipaddress
import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.inference.server.protocol.api_errors import APIError
from megatron_vita.inference.server.protocol.limits import Limits
from megatron_vita.inference.server.protocol.remote import RemoteFetcher, is_public
from megatron_vita.media.frame_archive import pack_frames
from tests.inference.server.fake_engine import FakeEngine
from tests.inference.server.media_makers import bomb, data_url, image, png, video
from tests.inference.server.running_server import RunningServer, running
from tests.media.video_files import clip

LIMITS = Limits(media_bytes=400_000, image_pixels=1_000_000, video_frames=5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """folder/media is allowed, folder/secret.png and folder/media-other/x.png are not."""
    folder = tmp_path_factory.mktemp("folder")
    for path in ("media/a.png", "media/sub/ä b.png", "secret.png", "media-other/x.png"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(png())
    (folder / "media/link.png").symlink_to("a.png")
    (folder / "media/escape.png").symlink_to("../secret.png")
    (folder / "media/escape").symlink_to("..")
    (folder / "media/circle.png").symlink_to("circle.png")
    os.mkfifo(folder / "media/pipe.png")
    (folder / "media/large.png").write_bytes(png() + b"\0" * 400_001)
    return folder / "media"


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[RunningServer]:
    with running(FakeEngine(), limits=LIMITS, media_roots=[root]) as server:
        yield server


def test_images_come_as_data_urls_in_order(server: RunningServer) -> None:
    parts = [*image(data_url(png(8, 9))), *image(data_url(png(10, 11), "application/octet-stream"))]
    assert server.chat(parts, stream=False).status_code == 200
    prompt = server.engine.prompts[-1]
    assert [file.data for file in prompt.images] == [png(8, 9), png(10, 11)]
    assert [part["type"] for part in prompt.messages[0]["content"]] == [
        "image",
        "text",
        "image",
        "text",
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_tells_which_moments_of_a_video_were_looked_at(
    server: RunningServer, stream: bool
) -> None:
    response = server.chat(
        video(data_url(clip(frames=20), "video/mp4")), stream=stream, max_frames=2
    )
    assert response.status_code == 200, response.text
    found = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))["videos"]
    assert len(found) == 1
    assert len(found[0]["times"]) == 2
    assert found[0]["times"] == sorted(found[0]["times"])
    assert 0 < found[0]["times"][-1] < found[0]["duration"]


def test_no_more_frames_are_taken_than_the_limit(server: RunningServer) -> None:
    response = server.chat(video(data_url(clip(frames=60), "video/mp4")))
    assert len(response.json()["videos"][0]["times"]) == 5


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (data_url(b"this is text, not an image"), "none of the kinds"),
        (data_url(b""), "empty"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png;base64,AAA", "base64"),
        ("data:image/png;base64,AAAAä", "base64"),
        ("data:image/png,hello", "data:TYPE;base64"),
        ("data:", "data:TYPE;base64"),
        (
            data_url(b"<svg xmlns='http://www.w3.org/2000/svg' onload='x'/>", "image/svg+xml"),
            "none of the kinds",
        ),
        (data_url(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"), "none of the kinds"),
        (data_url(png()[:20]), "cannot read"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_no_image_is_refused(server: RunningServer, url: str, said: str) -> None:
    error = server.error(image(url), status=400)
    assert error["param"] == "messages[0].content[0]"
    assert said in error["message"]


def test_bombs_are_refused_from_their_headers(server: RunningServer) -> None:
    for size, code in ((30_000, "invalid_media"), (2000, "image_pixels_exceeded")):
        error = server.error(image(data_url(bomb(size, size))), status=400)
        assert error["code"] == code
        assert "pixels" in error["message"]


def icon_of(data: bytes) -> bytes:
    """An icon that says it has 16 x 16 pixels, whatever the picture in it."""
    head = struct.pack("<HHH", 0, 1, 1)
    return head + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(data), 22) + data


@pytest.mark.parametrize(
    "data",
    [
        b"P6\n" + b" " * 200_000 + b"8 8 255\n" + b"\0" * 192,
        b"Pf 8 8 1\n" + b"\0" * 256,
        icon_of(png(2000, 2000)),
    ],
    ids=["spaces", "floats", "icon"],
)
def test_kinds_whose_size_is_not_known_at_little_cost_are_refused_unread(
    server: RunningServer, data: bytes
) -> None:
    error = server.error(image(data_url(data)), status=400)
    assert (error["code"], error["param"]) == ("invalid_media", "messages[0].content[0]")
    assert "JPEG2000, PNG" in error["message"]


def test_a_refused_image_is_told_the_kinds_that_are_read_here(server: RunningServer) -> None:
    message = server.error(image(data_url(b"text")), status=400)["message"]
    assert message.endswith("AVIF, BMP, GIF, JPEG, JPEG2000, PNG, TIFF, WEBP")


def test_videos_of_large_frames_are_refused() -> None:
    with running(FakeEngine(), limits=Limits(image_pixels=1000)) as server:
        error = server.error(video(data_url(clip(frames=2), "video/mp4")), status=400)
        assert error["code"] == "image_pixels_exceeded"


def test_videos_with_one_large_frame_are_refused(server: RunningServer) -> None:
    frames = pack_frames([("a.png", png()), ("b.png", png(2000, 2000)), ("c.png", png())], 1.0)
    error = server.error(video(data_url(frames, "application/zip")), status=400)
    assert (error["code"], error["param"]) == ("image_pixels_exceeded", "messages[0].content[0]")


@pytest.mark.parametrize(
    "data", [b"text", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"PK\x03\x04rubbish"]
)
def test_what_is_no_video_is_refused(server: RunningServer, data: bytes) -> None:
    assert (
        server.error(video(data_url(data, "video/mp4")), status=400)["param"]
        == "messages[0].content[0]"
    )


def test_all_media_of_a_request_count_together(server: RunningServer) -> None:
    half = png() + b"\0" * 250_000  # what follows an image's end is passed over
    assert server.chat(image(data_url(half))).status_code == 200
    error = server.error(image(data_url(half)) * 2, status=413)
    assert (error["code"], error["param"]) == ("media_bytes_exceeded", "messages[0].content[2]")


@pytest.mark.parametrize("name", ["a.png", "./a.png", "sub/ä b.png", "sub/../a.png", "link.png"])
def test_files_under_a_root_are_read(server: RunningServer, root: Path, name: str) -> None:
    for url in (name, f"{root}/{name}", f"file://{root}/{name}", f"file://localhost{root}/{name}"):
        assert server.chat(image(url)).status_code == 200, url
    assert server.engine.prompts[-1].images[0].data == png()


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png", "{root}/../secret.png", "{folder}/secret.png", "escape.png", "escape/secret.png",
        "{root}-other/x.png", "../media-other/x.png", "file://{folder}/secret.png", "file://{root}/%2e%2e/secret.png",
        "file:///etc/passwd", "/etc/passwd", "/proc/self/environ", "/dev/zero", "pipe.png", "circle.png", "sub", "",
        ".",         "nothing.png", "a.png\0", "\0", "a" * 5000, "file://elsewhere{root}/a.png", "ftp://x/a.png", "FILE:///etc/passwd",
        "gopher://x", "~/a.png", "//etc/passwd", "\\\\host\\x", "file:", "javascript:alert(1)",
    ],
)  # fmt: skip
def test_what_is_elsewhere_is_refused_as_what_does_not_exist(
    server: RunningServer, root: Path, name: str
) -> None:
    url = name.format(root=root, folder=root.parent)
    error = server.error(image(url), status=400)
    assert error["code"] == "media_not_found"
    assert error["message"].endswith(
        "is neither a data URL nor a file under the media folders of this server"
    )


def test_a_file_that_is_too_large_is_refused(server: RunningServer) -> None:
    assert server.error(image("large.png"), status=413)["code"] == "media_bytes_exceeded"


def test_without_a_root_no_file_is_read(echo: RunningServer, root: Path) -> None:
    assert echo.error(image(f"{root}/a.png"), status=400)["code"] == "media_not_found"


@pytest.mark.parametrize(
    "url", ["http://example.com/a.png", "https://example.com/a.png", "HTTP://example.com"]
)
def test_remote_urls_are_off_by_default(server: RunningServer, url: str) -> None:
    assert server.error(image(url), status=400)["code"] == "remote_media_off"


def test_a_url_that_is_too_long_is_refused_unread(site: str) -> None:
    with running(FakeEngine(), remote=Names(["127.0.0.1"]).fetcher()) as server:
        assert server.chat(image(f"{site}/image?".ljust(8192, "a"))).status_code == 200
        Site.asked.clear()
        error = server.error(image(f"{site}/image?".ljust(8193, "a")), status=400)
    assert "8,193 characters" in error["message"]
    assert Site.asked == []


PRIVATE = [
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "240.0.0.1", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2001:db8::1", "2001:0:1::",
    "fec0::1", "feff::1", "168.63.129.16", "::ffff:168.63.129.16", "64:ff9b::a83f:8110",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_known_in_every_spelling(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "2130706433",
        "0x7f.1",
        "127.1",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
    ],
)
def test_private_hosts_are_refused_however_they_are_written(host: str) -> None:
    with pytest.raises(APIError) as caught:
        fetch(RemoteFetcher(seconds=5), f"http://{host}:80/latest")
    assert caught.value.code == "private_address" or "cannot be fetched" in str(caught.value)


def fetch(fetcher: RemoteFetcher, url: str, most: int = 1000) -> bytes:
    return asyncio.run(fetcher.fetch(url, most=most))


class Site(http.server.BaseHTTPRequestHandler):
    """A remote server with every kind of hostile behaviour."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        assert isinstance(self.server, http.server.HTTPServer)
        moves = {
            "/to-private": f"http://10.0.0.1:{self.server.server_port}/x", "/to-file": "file:///etc/passwd",
            "/in-circles": "/in-circles", "/near": "/image",
        }  # fmt: skip
        self.send_response(404 if self.path == "/missing" else 302 if self.path in moves else 200)
        if self.path in moves:
            self.send_header("location", moves[self.path])
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(b"x" * 1000)
            if self.path == "/slow":
                time.sleep(3)
            if self.path.split("?")[0] == "/image":
                self.wfile.write(png())
        except OSError:
            return

    def log_message(self, *_: Any) -> None:
        """Tests are quiet."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as listener:
        listener.daemon_threads = True
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://site.example:{listener.server_port}"
        listener.shutdown()


class Names:
    """Resolves every name to the next of the given addresses, and takes 127.0.0.1 for public."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)

    async def resolve(self, host: str, port: int) -> list[Any]:
        if host == "site.example":
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            return [ipaddress.ip_address(address) for address in answer]
        return [ipaddress.ip_address(host)]

    def fetcher(self, seconds: float = 5.0) -> RemoteFetcher:
        public = ipaddress.ip_address("127.0.0.1")
        return RemoteFetcher(
            seconds=seconds, resolve=self.resolve, is_allowed=lambda a: a == public or is_public(a)
        )


def test_remote_media_are_fetched_where_they_are_allowed(site: str) -> None:
    with running(FakeEngine(), remote=Names(["127.0.0.1"]).fetcher()) as server:
        assert server.chat(image(f"{site}/near")).status_code == 200
        assert server.engine.prompts[-1].images[0].data == png()
        assert server.error(image(f"{site}/missing"), status=400)["message"].endswith(
            "has status 404"
        )


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/to-private", "no public address"),
        ("/to-file", "http or https"),
        ("/in-circles", "3 redirects"),
    ],
)
def test_redirects_are_checked_like_the_first_url(site: str, path: str, said: str) -> None:
    with pytest.raises(APIError, match=said):
        fetch(Names(["127.0.0.1"]).fetcher(), site + path)


def test_a_name_with_one_private_address_is_refused(site: str) -> None:
    with pytest.raises(APIError, match="no public address"):
        fetch(Names(["127.0.0.1", "10.0.0.1"]).fetcher(), f"{site}/image")


def test_a_name_is_resolved_once_and_its_checked_address_connected_to(site: str) -> None:
    names = Names(["127.0.0.1"], ["10.0.0.1"])
    assert fetch(names.fetcher(), f"{site}/image") == png()
    assert names.answers == [["10.0.0.1"]]
    Site.asked.clear()
    with pytest.raises(APIError, match="no public address"):
        fetch(names.fetcher(), f"{site}/image")
    assert Site.asked == []


def test_an_endless_remote_body_is_cut_off(site: str) -> None:
    with pytest.raises(APIError, match="more than 1,000 bytes"):
        fetch(Names(["127.0.0.1"]).fetcher(), f"{site}/endless")


def test_a_slow_remote_server_is_given_up(site: str) -> None:
    with pytest.raises(APIError, match=r"within 0\.5 s"):
        fetch(Names(["127.0.0.1"]).fetcher(0.5), f"{site}/slow")


@pytest.mark.parametrize(
    "url", ["http://", "http://user:pw@site.example/", "http://[", "http://x:99999/", "http://ä\0/"]
)
def test_urls_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(APIError):
        fetch(Names(["127.0.0.1"]).fetcher(), url)
