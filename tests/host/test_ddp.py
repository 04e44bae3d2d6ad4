"""Two gloo processes on the CPU do what one process does on the joint batch."""

from __future__ import annotations

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.host import harness

# Sums are taken in another order, and Adam divides by their root; weights are of the order 0.1, steps of 1e-3.
TOLERANCE = 1e-5

KEEP_EACH_RANK = """
import torch
from qsr_plugin import checkpoint, compat, train
compat.import_host()
from qsr_plugin.models.quant_sr_model import QuantSRModel as Model
save = Model.save
def keep(self, epoch, current_iter):
    torch.save(self.net.state_dict(), f"rank{self.opt['rank']}_{current_iter}.pth")
    save(self, epoch, current_iter)
Model.save = keep
train.main()
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.write_data(tmp_path_factory.mktemp("data"), count=8)


LR = {"weights": 1e-3, "ranges": 1e-2, "weight_ranges": 1e-3}
#: What a distributed step may do beside the plain backward of the host: a teacher and ranges joined over processes, two
#: gradient sets combined after each is averaged, several forwards.
RECIPES = {
    "tracking": {"losses": [{"type": "SKTLoss"}]},
    "cooperative": {
        "base": "odm",
        "bits": {"weight": 2, "act": 2},
        "stages": [{"iters": 8, "lr": LR, "train": ["weights"]}, {"lr": LR}],
        # So large that it would show if the norm or the angle were not those of the joint batch.
        "losses": [{"type": "MismatchLoss", "loss_weight": 1e-4}],
    },
    "depths": {
        "base": "percentile",
        "depth": {"role": "block"},
        "stages": [{"iters": 8, "lr": LR}, {"lr": LR, "depths": [1.0, 0.5]}],
    },
}


def options(data: Path, batch: int, recipe: dict) -> dict:
    return harness.options(
        data,
        datasets={"train": {"batch_size_per_gpu": batch}},
        # Adam divides by the gradient's size: without eps a rounding error of a zero gradient becomes a full step.
        train={"total_iter": 12, "optim_g": {"eps": 1e-4}},
        recipe=recipe,
        path={"pretrain_network_float": "float.pth"},
    )


def write_float(folder: Path) -> None:
    from qsr_plugin import compat

    compat.import_host()
    from qsr_plugin.archs.quant_net_arch import build_backbone

    torch.manual_seed(0)
    net = build_backbone(harness.options(folder)["network_g"]["backbone"])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"params": net.state_dict()}, folder / "float.pth")


def one_and_two_processes(script: Path, arguments: dict[str, list[str]], folder: Path, **environment: str):
    """Run a script on one process in ``folder/one`` and on two in ``folder/two``, at the same time."""
    port = f"--master_port={free_port()}"
    distributed = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", port]
    commands = {"one": [], "two": distributed}
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(harness.run, [*command, str(script), *arguments[name]], folder / name, **environment)
            for name, command in commands.items()
        ]
    done = [run.result() for run in runs]
    for each in done:
        assert each.returncode == 0, each.stdout[-2000:] + each.stderr[-3000:]
    return done


def assert_equal(joint: dict, ranks: list[dict], atol: float) -> None:
    """Ranges, weights and buffers: identical on both ranks, and those of the joint batch."""
    assert harness.differences(*ranks) == []
    for key, value in joint.items():
        torch.testing.assert_close(ranks[0][key], value, rtol=10 * atol, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_two_processes_equal_one_on_the_joint_batch(data: Path, tmp_path: Path, recipe: dict) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    script = tmp_path / "keep.py"
    script.write_text(KEEP_EACH_RANK)
    for folder in (one, two):
        write_float(folder)
    arguments = {}
    for folder, per_process, more in ((one, 4, []), (two, 2, ["--launcher", "pytorch"])):
        opt = harness.write_options(options(data, per_process, recipe), tmp_path / f"{folder.name}.yml")
        arguments[folder.name] = ["-opt", str(opt), *more]
    _, pair = one_and_two_processes(script, arguments, tmp_path)
    assert "Stage 2 of 2" in pair.stdout + pair.stderr
    for iteration in (4, 8, 12):
        ranks = [harness.read(two / f"rank{rank}_{iteration}.pth") for rank in (0, 1)]
        assert_equal(harness.read(one / f"rank0_{iteration}.pth"), ranks, TOLERANCE)


#: Gradients of the steps of activations on 0..255 are tiny.
FAST = {**LR, "ranges": 1e3}
#: What quantizers themselves do over a batch: ranges of it, tracked or taken anew, and gradient scales that count it.
QUANTIZERS = {
    "steps_and_depths": {"base": "quantsr", "stages": [{"iters": 4, "lr": FAST}, {"lr": FAST, "depths": [1.0, 0.5]}]},
    "tracked_mean": {
        "base": "fqsr",
        "stages": [{"iters": 4, "lr": LR, "track_ranges": "mean", "train": ["weights", "others"]}, {"lr": LR}],
    },
    "tracked_extremes": {
        "base": "linq",
        "quantizers": {"act": {"type": "affine"}},
        "stages": [{"iters": 4, "lr": LR, "track_ranges": 0.5}, {"lr": LR}],
    },
    "largest_of_the_batch": {"base": "linq", "stages": [{"lr": LR}]},
    "steps": {"base": "lsq", "stages": [{"lr": FAST}]},
}

TRAIN_ON_HALVES = """
import json, os, sys
from pathlib import Path
import torch
from torch import distributed as dist
from tests.host import every_method
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.train import leave_process_group

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
for name, recipe in json.loads(sys.argv[2]).items():
    recipe["calibration"] = {"images": 4, "batch": 2}
    options = every_method.options(
        Path(sys.argv[1]), Path.cwd(), recipe["base"], "EDSR", dist=world > 1, rank=rank, world_size=world
    )
    options["network_g"]["recipe"] = load_recipe(recipe).to_dict()
    # With such an eps a step is as large as its gradient, so that one that is wrong by a factor shows.
    options["train"]["optim_g"] = {"type": "Adam", "lr": 1e-3, "eps": 1e-3}
    model = every_method.build_model(options)
    for iteration in range(1, 9):
        model.update_learning_rate(iteration)
        halves = [every_method.batch(iteration, half) for half in ([rank] if world > 1 else (0, 1))]
        model.feed_data({key: torch.cat([half[key] for half in halves]) for key in ("lq", "gt")})
        model.optimize_parameters(iteration)
        if iteration in (4, 8):
            torch.save(model.net.state_dict(), f"{name}_{iteration}_rank{rank}.pth")
leave_process_group()
"""


def test_quantizers_see_the_joint_batch(data: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN_ON_HALVES)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = [str(data), json.dumps(QUANTIZERS)]
    one_and_two_processes(script, {"one": arguments, "two": arguments}, tmp_path, PYTHONPATH=path)
    for name in QUANTIZERS:
        for iteration in (4, 8):
            ranks = [harness.read(tmp_path / f"two/{name}_{iteration}_rank{rank}.pth") for rank in (0, 1)]
            assert_equal(harness.read(tmp_path / f"one/{name}_{iteration}_rank0.pth"), ranks, TOLERANCE / 10)


LOSSES_ON_HALVES = """
import os
import torch
from torch import distributed as dist, nn
from qsr_plugin import compat
compat.import_host()
from qsr_plugin.losses.bit_loss import BitLoss
from qsr_plugin.losses.context import StepContext
from qsr_plugin.losses.distill_loss import BlockFeatureLoss
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.train import leave_process_group

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bits, self.mix = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, bits, features):
        chosen = {str(place): own + offset for place, (own, offset) in enumerate(zip(bits, self.bits))}
        return chosen, [share * features[0] + features[1] for share in self.mix]

def loss_of(kind, images, bits, features):
    chosen, student = model(bits[:, images], features[:, images])
    if kind == "features":
        return BlockFeatureLoss(loss_weight=10).compare(student, [features[2, images]] * 2) + 0 * sum(chosen["0"])
    image = torch.zeros(len(images), 3, 4, 4, dtype=torch.double)
    context = StepContext(image, image, ForwardRecord(len(images), bits=chosen))
    return BitLoss(target_bits=4, loss_weight=50)(context) + 0 * sum(one.sum() for one in student)

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
generator = torch.Generator().manual_seed(0)
features = torch.randn(3, 6, 2, 3, 3, generator=generator).double()
features[:, 3:] *= torch.tensor([5.0, 2.0, 1.0]).view(3, 1, 1, 1, 1)  # else norms of the halves are alike
below, above = [4.0, 4, 3], [4.0, 4, 5]
halves = {"at": below + above, "over": below + [6.0] * 3, "under": [2.0] * 3 + above, "features": below * 2}
model = net = Net().double()
if world > 1:
    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(net)
images, seen = range(6)[rank * 6 // world : (rank + 1) * 6 // world], {}
for kind, widths in halves.items():
    net.zero_grad()
    loss = loss_of(kind, list(images), torch.tensor([widths] * 2).double(), features)
    loss.backward()
    value = loss.detach().clone()
    if world > 1:
        dist.all_reduce(value)
    seen[kind] = torch.stack([value / world, *net.bits.grad, *net.mix.grad])
torch.save(seen, f"losses_rank{rank}.pth")
leave_process_group()
"""


def test_losses_see_the_joint_batch(tmp_path: Path) -> None:
    """Values and gradients, each averaged over processes as the host does, of losses that are no mean over images."""
    script = tmp_path / "losses.py"
    script.write_text(LOSSES_ON_HALVES)
    one_and_two_processes(script, {"one": [], "two": []}, tmp_path)
    joint = harness.read(tmp_path / "one/losses_rank0.pth")
    ranks = [harness.read(tmp_path / f"two/losses_rank{rank}.pth") for rank in (0, 1)]
    # Loss, slopes of the bits of two places, slopes of the features of two blocks.
    assert joint["at"].tolist() == pytest.approx([0, 12.5, 12.5, 0, 0])
    assert joint["over"][1:3].tolist() == pytest.approx([25, 25])
    assert not joint["under"].any() and joint["features"][[0, 3, 4]].abs().min() > 1e-4
    assert_equal(joint, ranks, 1e-12)


def test_unused_parameter_search_is_refused(data: Path, tmp_path: Path) -> None:
    opt = harness.write_options(harness.options(data, find_unused_parameters=True), tmp_path / "run.yml")
    done = harness.run(["-m", "qsr_plugin.train", "-opt", str(opt)], tmp_path)
    assert done.returncode != 0 and "find_unused_parameters" in done.stderr and "Traceback" not in done.stderr
