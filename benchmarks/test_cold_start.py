"""What the first call costs: `import activemark_fast`, and `embed` in a process that has done nothing before.

    python -m pytest benchmarks/test_cold_start.py --benchmark-only

Every round is a process of its own; what Triton compiled in the first is there for the next. `embed` is timed
from the call to the saved watermark, after the model was built: on a GPU a ViT-L/14, on a CPU the demo model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 3


def import_seconds(package: str) -> float:
    program = f"import time; t = time.perf_counter(); import {package}; print(time.perf_counter() - t)"
    return float(output(sys.executable, "-c", program))


def output(*command: str) -> str:
    # Interpreters that pytest starts would look for the package where it was started.
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_import(benchmark: BenchmarkFixture) -> None:
    import_seconds("activemark_fast")  # writes its byte code
    alone: list[float] = []
    ours: list[float] = []
    benchmark.pedantic(
        lambda: ours.append(import_seconds("activemark_fast")),
        setup=lambda: alone.append(import_seconds("torch")),
        rounds=ROUNDS,
    )
    benchmark.extra_info["seconds added to importing torch"] = round(min(ours) - min(alone), 2)


def test_first_embed(benchmark: BenchmarkFixture) -> None:
    rows: list[dict[str, float | str]] = []
    benchmark.pedantic(lambda: rows.append(json.loads(output(sys.executable, __file__))), rounds=2)
    benchmark.extra_info.update(rows[-1])
    benchmark.extra_info["of the first call, in the first process"] = rows[0]["seconds of the first call"]


def main() -> None:
    """One process' work: prints a JSON object."""
    from test_embed_minutes import DEVICE, KEY, MODELS

    import activemark_fast

    name = "ViT-L/14" if DEVICE.type == "cuda" else "demo"
    model = MODELS[name][0]().to(DEVICE)
    seconds = []
    with TemporaryDirectory() as folder:
        for call in range(2):
            started = time.perf_counter()
            embedding = activemark_fast.embed(model, KEY)
            embedding.watermark.save(Path(folder, f"{call}.safetensors"))
            seconds.append(time.perf_counter() - started)
    row = {
        "model": name,
        "seconds of the first call": round(seconds[0], 2),
        "of the second": round(seconds[1], 2),
        "gradient steps": embedding.steps,
        "detection rate": embedding.quality.detection_rate,
        "fidelity": round(embedding.fidelity, 4),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
