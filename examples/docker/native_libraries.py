"""List the native libraries that wheels carry, as a CycloneDX document.

    python examples/docker/native_libraries.py > native.cdx.json

Scanners of images find packages of the system and of Python; the decoders inside PyAV's and
Pillow's wheels are in neither list. Trivy and Grype read files named *.cdx.json in an image.
"""

import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
from PIL import features

# libavcodec-d61378e8.so.63.1.102: name, checksum of the wheel's build, version of the interface
LIBRARY = re.compile(r"^(?P<name>lib[\w+-]+?)(-[0-9a-f]{8,})?\.so\.(?P<version>[\d.]+)$")

FEATURES = {
    "libjpeg": "libjpeg_turbo",
    "libtiff": "libtiff",
    "libopenjp2": "jpg_2000",
    "libwebp": "webp",
    "libavif": "avif",
    "libfreetype": "freetype2",
}
"""Pillow's names of libraries that tell their releases."""


def bundled_libraries() -> Iterator[dict[str, Any]]:
    """Yield a component for each library in a folder NAME.libs of an installed wheel.

    Versions are those of the libraries' interfaces, but for those that tell their own.
    """
    releases = {"av": _releases_in_av(), "pillow": _releases_in_pillow()}
    packages = Path(sysconfig.get_path("platlib"))
    for path in sorted(packages.glob("*.libs/*")):
        found = LIBRARY.match(path.name)
        if not found:
            continue
        wheel = path.parent.name.removesuffix(".libs")
        yield {
            "type": "library",
            "bom-ref": f"{wheel}/{path.name}",
            "name": found["name"],
            "version": releases.get(wheel, {}).get(found["name"], found["version"]),
            "properties": [
                {"name": "wheel", "value": f"{wheel} {version(wheel)}"},
                {"name": "file", "value": path.relative_to(packages).as_posix()},
            ],
        }


def _releases_in_av() -> dict[str, str]:
    """FFmpeg's release, which advisories name, for each of its libraries."""
    return dict.fromkeys(av.library_versions, av.ffmpeg_version_info)


def _releases_in_pillow() -> dict[str, str]:
    found = {name: features.version(feature) for name, feature in FEATURES.items()}
    return {name: release for name, release in found.items() if release}


def document() -> dict[str, Any]:
    """Build the CycloneDX document."""
    head = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    return {**head, "components": list(bundled_libraries())}


if __name__ == "__main__":
    json.dump(document(), sys.stdout, indent=1)
