"""A server process whose engine repeats what it is asked: serve_fake.py PORT [--fails-after N]
[--step-seconds S]."""

import argparse
import os

from megatron_vita import platform
from megatron_vita.inference.server.app import ServerOptions
from megatron_vita.inference.server.server import serve
from tests.inference.server.fake_engine import FakeEngine

parser = argparse.ArgumentParser()
parser.add_argument("port", type=int)
parser.add_argument("--fails-after", type=int)
parser.add_argument("--step-seconds", type=float, default=0.0)
arguments = parser.parse_args()
platform.set_up_logging(0)
engine = FakeEngine(fails_after=arguments.fails_after, step_seconds=arguments.step_seconds)
code = serve(engine, ServerOptions(model_name="toy"), host="127.0.0.1", port=arguments.port)
os._exit(code)
