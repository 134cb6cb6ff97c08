"""Types of arguments, and the way to say something."""

from __future__ import annotations

import argparse
import re
import sys


def positive(text: str) -> int:
    """Return a number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def seed_number(text: str) -> int:
    """Return a number from 0 to 2^62."""
    value = int(text)
    if not 0 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"{value} must be from 0 to 2^62")
    return value


def device_name(text: str) -> str:
    """Return the name of a device, which this machine need not have."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda, cuda:N and mps")
    return text


def say(text: str) -> None:
    """Write a line to stdout."""
    sys.stdout.write(f"{text}\n")
