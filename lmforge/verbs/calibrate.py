"""calibrate [output=FOLDER] [links=false]: measure this machine in under a minute: products, memory, an all-reduce, a training step.

What it finds is written to <output>/calibration/, and plans for this hardware are timed with it. --json for scripts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from lmforge.codec import encode
from lmforge.errors import ConfigError
from lmforge.hardware.calibration import Calibration, make_folder

NOISY = 0.2  # of the training step's time, that its repeats differ by; on a quiet machine it is less than half of that
USAGE = "type: calibrate [output=FOLDER] [links=false] [--json]"


def main(argv: Sequence[str]) -> int:
    """Measure, write, and say what was found."""
    if set(argv) & {"-h", "--help"}:
        print(USAGE.removeprefix("type: "))
        return 0
    output, links = "outputs", True
    for word in argv:
        key, _, value = word.partition("=")
        if key == "output" and value:
            output = value
        elif key == "links" and value in ("true", "false"):
            links = value == "true"
        elif word != "--json":
            raise ConfigError(word, "is no word of calibrate", USAGE)
    make_folder(output)
    from lmforge.runtime.calibration import measure

    started = time.monotonic()
    found = measure(links, output)
    file = found.save(output)
    if "--json" in argv:
        print(json.dumps(encode(found) | {"file": str(file)}, indent=1))
        return 0
    for line in said(found):
        print(line)
    print(f"{time.monotonic() - started:.0f} s; written to {file}: plans for this hardware are timed with it")
    return 0


def said(found: Calibration) -> list[str]:
    """What was measured, for people."""
    rates = ", ".join(f"{dtype} {rate / 1e9:,.1f}" for dtype, rate in found.matmul.items())
    where = f"{found.threads} threads" if found.accelerator == "cpu" else f"{found.devices} GPUs"
    lines = [f"{found.name}, {where}, torch {found.torch}", f"matrix products   {rates} GFLOP/s"]
    for dtype, one in found.attention.items():
        lines.append(f"attention         {dtype} {one.causal / 1e9:,.1f} GFLOP/s causal, {one.masked / 1e9:,.1f} under a mask")
    lines.append(f"memory            {found.memory / 1e9:,.1f} GB/s, AdamW {found.update / 1e9:,.1f} GB/s, {1e6 * found.launch:.1f} us a kernel")
    lines.append(f"data              {found.loader / 1e6:,.1f} M tokens/s a process")
    if found.bandwidth and found.latency is not None:
        lines.append(f"two ranks         {found.bandwidth / 1e9:,.2f} GB/s, {1e6 * found.latency:.0f} us")
    lines.append(f"a training step   {found.residual:.2f} times these kernels besides products and update (noise {100 * found.noise:.0f} %)")
    if found.noise > NOISY:
        lines.append("                  other work ran beside it: calibrate again when this machine is quiet")
    lines.append(f"around a step     {1e3 * found.step:.1f} ms of the loop")
    if found.learned_from:
        lines.append(f"finished runs     {found.learned:.2f} times that, by {found.learned_from} training steps of this store")
    return lines
