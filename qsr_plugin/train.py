"""``python -m qsr_plugin.train -opt FILE``: BasicSR's training with this package registered.

Takes BasicSR's flags, and adds: ``_base_`` inheritance in option files, a check of data and options before anything is
written, exact resume on any device, and DDP on machines without a GPU.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Optional

import torch

from qsr_plugin import compat
from qsr_plugin.chain import start_of
from qsr_plugin.checkpoint import CheckpointError, read_file
from qsr_plugin.errors import UserError
from qsr_plugin.memory import keep_freed_memory
from qsr_plugin.options_file import OptionsError, load_options, write_options

logger = logging.getLogger("basicsr")

#: Exit status of a program that Ctrl-C ended.
_INTERRUPTED = 130


def own_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into what is handled here and what is left to the host.

    ``--force_yml`` is applied here, before the data are checked and the recipe is read. Old launchers pass
    ``--local-rank``, which the host spells ``--local_rank``.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, usage="%(prog)s -opt FILE [options]")
    parser.add_argument("-opt", required=True, help="option file (YAML), with _base_ inheritance")
    parser.add_argument("--force_yml", nargs="+", default=[], metavar="KEY:KEY=VALUE", help="values over the file's")
    parser.add_argument("--allow-recipe-change", action="store_true", help="resume although the recipe differs")
    parser.epilog = "BasicSR's own: --launcher none|pytorch|slurm, --auto_resume, --debug, --local_rank"
    return parser.parse_known_args([a.replace("--local-rank", "--local_rank") for a in argv])


def host_arguments(flags: list[str]) -> argparse.Namespace:
    """What the host will read as ``launcher`` and ``auto_resume`` from its part of the command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--launcher", default="none")
    parser.add_argument("--auto_resume", action="store_true")
    return parser.parse_known_args(flags)[0]


def resolved_command(own: argparse.Namespace, flags: list[str], folder: Path) -> dict[str, Any]:
    """Resolve the option file and point the host's command line to the result.

    Args:
        own: What :func:`own_arguments` takes from the command line.
        flags: What it leaves to the host.
        folder: Where to write the resolved file; the host copies it into the experiment folder.

    Returns:
        The resolved options.
    """
    options = load_options(own.opt, own.force_yml)
    options["path"] = options.get("path") or {}
    if own.allow_recipe_change:
        options["allow_recipe_change"] = True
    if options.get("num_gpu") == "auto" and host_arguments(flags).launcher == "none":
        options["num_gpu"] = min(torch.cuda.device_count(), 1)  # more than one takes a launcher
    resolved = folder / Path(own.opt).name
    write_options(options, resolved)
    sys.argv = [sys.argv[0], "-opt", str(resolved), *flags]
    return options


def check_before_start(options: dict[str, Any]) -> None:
    """Find what would fail later: names, network, recipe, weights, data. Nothing is written.

    Raises:
        UserError: With what is wrong and what to do.
    """
    compat.require_registered("model", str(options.get("model_type")))
    network = dict(options.get("network_g") or {})
    compat.require_registered("arch", str(network.get("type")))
    if network["type"] == "QuantNet":
        from qsr_plugin.archs.quant_net_arch import QuantNet
        from qsr_plugin.losses.build import build_step_losses
        from qsr_plugin.models.teaching import require_float_weights

        recipe = QuantNet(network["backbone"], network["recipe"]).recipe
        losses = build_step_losses(recipe.losses)
        if "train" in options:
            require_float_weights(options, recipe, losses.values())
    for key, value in options["path"].items():
        if key.startswith("pretrain_network") and value:
            read_file(value)
    refuse_bad_data(options)


def prepare_start(options: dict[str, Any], resolved: Path, flags: list[str], forced: Sequence[str] = ()) -> None:
    """Have the training start from another one's result if the options say so, training that one first if need be.

    Args:
        options: Resolved options; the path of the start is put in.
        resolved: Their file, which is written again.
        flags: The host's part of the command line.
        forced: ``key:key=value`` entries of the command line.
    """
    host = host_arguments(flags)
    resuming = bool(options["path"].get("resume_state")) or (host.auto_resume and any(_saved_states(options)))
    start = start_of(options, resuming=resuming, distributed=host.launcher != "none", forced=forced)
    if start is not None:
        options["path"]["pretrain_network_quantized"] = str(start)
        write_options(options, resolved)


def _saved_states(options: Mapping[str, Any]) -> Iterator[Path]:
    """Training states of the run in the current folder, before the host has parsed its options."""
    return Path("experiments", options["name"], "training_states").glob("*.state")


def newest_state(folder: Path, models: Path) -> Optional[tuple[Path, dict[str, Any]]]:
    """The newest training state that can be read together with its network.

    Unreadable files (a crash of another program, a full disk) are passed over with a warning.
    """
    states = [path for path in folder.glob("*.state") if path.stem.isdigit()]
    for path in sorted(states, key=lambda p: int(p.stem), reverse=True):
        try:
            state, _ = read_file(path)
            read_file(models / f"net_g_{path.stem}.pth")
            return path, state
        except CheckpointError as error:
            logging.getLogger("qsr_plugin").warning("passing over a broken checkpoint: %s", error)
    return None


def load_resume_state(opt: dict[str, Any]) -> Optional[dict[str, Any]]:
    """Replaces the host's function, which asks for a CUDA device and looks below the current folder only."""
    from basicsr.utils import check_resume

    from qsr_plugin.data.exact_resume import ResumableSampler

    state = None
    if opt["auto_resume"]:
        found = newest_state(Path(opt["path"]["training_states"]), Path(opt["path"]["models"]))
        if found:
            path, state = found
            opt["path"]["resume_state"] = str(path)
    elif opt["path"].get("resume_state"):
        state, _ = read_file(opt["path"]["resume_state"])
    if state is not None:
        check_resume(opt, state["iter"])
        opt["manual_seed"] = state.get("manual_seed", opt["manual_seed"])
    ResumableSampler.manual_seed = opt["manual_seed"]
    return state


def refuse_bad_data(options: dict[str, Any]) -> None:
    """Look at the data sets before anything is written.

    Raises:
        OptionsError: With the list of problems.
    """
    from qsr_plugin.data.check import check_options

    problems = check_options(options)
    if problems:
        raise OptionsError("\n".join(["the data cannot be used:", *map(str, problems)]))


def patch_pipeline(resume: dict[str, Any]) -> None:
    """Give the host's training module our resume, sampler and seeded datasets.

    Args:
        resume: Filled with the resume state once it is read; the data loaders are built after that.
    """
    import basicsr.train as host

    from qsr_plugin.data.exact_resume import ResumableSampler, SeededDataset

    build_dataset, create_loaders = host.build_dataset, host.create_train_val_dataloader

    def load_state(opt: dict[str, Any]) -> Optional[dict[str, Any]]:
        resume["state"] = load_resume_state(opt)
        return resume["state"]

    def build(options: dict[str, Any]):
        dataset = build_dataset(options)
        return SeededDataset(dataset) if options["phase"] == "train" else dataset

    def create(opt: dict[str, Any], log: logging.Logger):
        train_loader, sampler, val_loaders, _, total_iters = create_loaders(opt, log)
        batches = len(sampler) // train_loader.batch_size
        if batches == 0:
            raise OptionsError(
                f"datasets.train: {len(sampler)} image(s) per process do not fill one batch of "
                f"{train_loader.batch_size}: raise dataset_enlarge_ratio or lower batch_size_per_gpu"
            )
        state = resume.get("state")
        if state is not None:
            done = state["iter"] - state["epoch"] * batches
            if not 0 <= done <= batches:
                log.warning("The data set or the batch size has changed: the interrupted epoch starts anew.")
                done = 0
            sampler.start = (state["epoch"], done * train_loader.batch_size)
        # The host counts the incomplete last batch, which its loader drops, and so may stop early.
        return train_loader, sampler, val_loaders, math.ceil(total_iters / batches), total_iters

    host.load_resume_state, host.build_dataset = load_state, build
    host.EnlargedSampler, host.create_train_val_dataloader = ResumableSampler, create


def run(pipeline: str, argv: Optional[list[str]]) -> None:
    """Resolve the options, check the data, and hand over to a pipeline of the host.

    Args:
        pipeline: ``train`` or ``test``.
        argv: Command line without the program name; ``None`` takes this process's.

    Raises:
        SystemExit: With a message, for anything the user can mend.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    options: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="qsr_") as folder:
            own, flags = own_arguments(sys.argv[1:] if argv is None else argv)
            options = resolved_command(own, flags, Path(folder))
            compat.import_host()
            logging.getLogger("qsr_plugin").info("using %s", compat.describe_host())
            check_before_start(options)
            keep_freed_memory()
            if pipeline == "train":
                prepare_start(options, Path(sys.argv[2]), flags, own.force_yml)
                patch_pipeline({})
            module = import_module(f"basicsr.{pipeline}")
            getattr(module, f"{pipeline}_pipeline")(os.getcwd())
    except (UserError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted{_how_to_go_on(options) if pipeline == 'train' and options else ''}\n")
        raise SystemExit(_INTERRUPTED) from None
    leave_process_group()


def _how_to_go_on(options: Mapping[str, Any]) -> str:
    saved = max((int(path.stem) for path in _saved_states(options) if path.stem.isdigit()), default=0)
    if saved:
        return f"; --auto_resume goes on from iteration {saved:,}, the newest saved state"
    every = (options.get("logger") or {}).get("save_checkpoint_freq")
    return f"; no state is saved yet, so it starts anew (logger.save_checkpoint_freq is {every})"


def leave_process_group() -> None:
    """End a gloo run at once: its threads can abort or hang a process while the interpreter shuts down."""
    from torch import distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.barrier()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def main(argv: Optional[list[str]] = None) -> None:
    """Train as the option file says; results go to ``experiments/`` in the current folder."""
    run("train", argv)


if __name__ == "__main__":
    main()
