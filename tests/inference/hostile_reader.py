"""The program that reads media, whose decoder is slow, hangs, crashes or fails where the name of a
file says so."""

import os
import time

from megatron_vita.inference.vision import decode_worker

decode_tiles = decode_worker.decode_tiles
probe_video = decode_worker.probe_video


def misbehave(name: str) -> None:
    if "slow" in name:
        time.sleep(1.5)
    if "hangs" in name:
        time.sleep(3600)
    if "crashes" in name:
        os.abort()
    if "fails" in name:
        raise ZeroDivisionError("of a decoder")


def decode(*arguments: object, name: str, **options: object) -> object:
    misbehave(name)
    return decode_tiles(*arguments, name=name, **options)  # type: ignore[arg-type]


def probe(file: object, name: str) -> object:
    if "early" in name:
        misbehave(name)
    return probe_video(file, name)  # type: ignore[arg-type]


vars(decode_worker).update(decode_tiles=decode, probe_video=probe)

if __name__ == "__main__":
    decode_worker.main()
