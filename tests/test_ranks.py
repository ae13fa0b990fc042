from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import vit

from activemark_fast.embedding import embed
from activemark_fast.ranks import ALONE
from activemark_fast.watermark import fingerprint

KEY = b"the key of the tests of ranks, 32"
SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import torch.distributed as dist
from datetime import timedelta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, set_model_state_dict
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tiny import vit
from activemark_fast.embedding import embed
from activemark_fast.ranks import Ranks
from activemark_fast.watermark import fingerprint
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=120))
ranks, cpu = Ranks(dist.group.WORLD), torch.device("cpu")
ran = []
def task(index):
    ran.append(index)
    return [torch.tensor(index), torch.full((2, index), float(index), dtype=torch.bfloat16)]
found = list(ranks.each([lambda i=i: task(i) for i in range(5)], cpu))
assert [int(one) for one, _ in found] == [0, 1, 2, 3, 4]
assert found[3][1].tolist() == [[3.0] * 3] * 2
assert ran == [i for i in range(5) if i % 2 == ranks.rank], ran
found = list(ranks.each([lambda i=i: task(i) for i in range(5, 8)], cpu, [1, 1, 0]))
assert [int(one) for one, _ in found] == [5, 6, 7]
assert ranks.least(3 + ranks.rank) == 3
spread, whole = vit(), vit(seed=1)
fully_shard(spread, mesh=init_device_mesh("cpu", (2,)))
everything = StateDictOptions(full_state_dict=True)
whole.load_state_dict(get_model_state_dict(spread, options=everything))
made = embed(whole, {KEY!r}, group=dist.group.WORLD)
set_model_state_dict(spread, made.model.state_dict(), options=everything)
after = get_model_state_dict(spread, options=everything)
assert all(torch.equal(after[name], tensor) for name, tensor in made.model.state_dict().items())
assert all(isinstance(parameter, DTensor) for parameter in spread.parameters())
with open(sys.argv[1] + str(ranks.rank), "w") as file:
    file.write(f"{{fingerprint(made.model)}} {{made.watermark.digest().hex()}} {{made.quality!r}}")
dist.destroy_process_group()
"""


def test_two_processes_make_the_mark_of_one_bit_for_bit_of_a_spread_model_too(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "made")], env=shared | {"RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    made = embed(vit(), KEY)
    told = f"{fingerprint(made.model)} {made.watermark.digest().hex()} {made.quality!r}"
    assert (tmp_path / "made0").read_text() == told
    assert (tmp_path / "made1").read_text() == told


def test_a_process_alone_runs_all_in_order() -> None:
    tasks = [lambda index=index: [torch.tensor(index)] for index in range(3)]
    assert [int(one) for (one,) in ALONE.each(tasks, torch.device("cpu"))] == [0, 1, 2]
    assert ALONE.least(5) == 5


def test_what_a_group_cannot_do_is_refused(tmp_path: Path) -> None:
    group = object()
    with pytest.raises(ValueError, match="group: wanted the keyed codec and no work"):
        embed(vit(), KEY, group=group, work=tmp_path / "work")  # type: ignore[arg-type]
