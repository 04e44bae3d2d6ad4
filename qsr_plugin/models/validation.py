"""Validation of a quantized network in the host's loop: whole images or patches, activation bits, ranges."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import nn

from qsr_plugin.data.patches import PatchOptions
from qsr_plugin.errors import suggest
from qsr_plugin.models.validation_results import costs_of, quality_of, write_validation
from qsr_plugin.options_file import OptionsError
from qsr_plugin.quant.depth import set_depth
from qsr_plugin.quant.surgery import policies
from qsr_plugin.report.fab import BitStatistics, BitTally
from qsr_plugin.report.patch_bits import run_and_observe
from qsr_plugin.report.result_schema import Costs, Quality

_LINE = 110  # letters
#: What is read here from ``val``, and how alike a key must be, from 0 to 1, to be taken for a slip of it.
_OURS, _ALIKE = ("depth", "patches"), 0.75


class Validation:
    """Mixin of the model: ``val.patches``, ``val.depth``, bits beside the host's metrics, and how ranges stand."""

    def __init__(self, opt: dict[str, Any]) -> None:
        # Read before anything is built, so that a wrong key is told now and not hours later.
        refuse_misspelt(opt.get("val") or {})
        self._patches = PatchOptions.read((opt.get("val") or {}).get("patches"))
        self._tally, self._images = BitTally(), 0
        self._quality: dict[str, Quality] = {}
        self._costs: Costs | None = None
        super().__init__(opt)

    def validation(self, dataloader, current_iter: int, tb_logger, save_img: bool = False) -> None:
        """Validate as the host does, with random states left as they were, and log bits and ranges."""
        self._tally, self._images = BitTally(), 0
        self.net.drop_pairs()  # a whole image's would take many times a training step's memory
        with torch.random.fork_rng():
            super().validation(dataloader, current_iter, tb_logger, save_img)
        if self.opt["rank"] == 0:
            self.log_ranges(current_iter, tb_logger)

    def test(self) -> None:
        """Super-resolve the current image, whole or in the patches of ``val.patches``, and note its bits.

        Raises:
            torch.OutOfMemoryError: If memory is too small. Before that, patches shrink, but only where bits are fixed:
                chosen ones depend on the size, and with them FAB and PSNR.
        """
        net = self.net_g_ema if hasattr(self, "net_g_ema") else self.net
        cut, depth = {} if self._patches is None else self._patches.model_dump(), self.opt["val"].get("depth")
        if depth:
            set_depth(net, depth)
        self.output, parts = run_and_observe(net, self.lq, self.opt["scale"], **cut, may_shrink=_fixed(net))
        if depth:
            set_depth(net, None)
        images = [[part] for part in parts] if self._patches is None else [parts]
        for image in images:
            self._tally.add([part.bits for part in image], [part.others for part in image])
        self._images += len(images)

    def _log_validation_metric_values(self, current_iter: int, dataset_name: str, tb_logger) -> None:
        super()._log_validation_metric_values(current_iter, dataset_name, tb_logger)
        bits, logger = self._tally.statistics(), get_root_logger()
        logger.info(f"\t # FAB {dataset_name}: {bits.fab:.3f}")
        if bits.varies:
            logger.info("\n\t".join(bit_lines(dataset_name, bits)))
        if tb_logger:
            tb_logger.add_scalar(f"metrics/{dataset_name}/fab", bits.fab, current_iter)
            for width, share in bits.shares.items() if bits.varies else ():
                tb_logger.add_scalar(f"metrics/{dataset_name}/share_of_{width}_bits", share, current_iter)
        self._write_results(current_iter, dataset_name, bits)

    def _write_results(self, current_iter: int | str, dataset_name: str, bits: BitStatistics) -> None:
        """``results.json``: the last scores on every data set, and the costs with the bits chosen on the first."""
        quality = quality_of(self.opt, self.metric_results, bits, self._images, self._patches)
        if quality is None:
            return
        self._quality[dataset_name] = quality
        net, depth = getattr(self, "net_g_ema", self.net), self.opt["val"].get("depth")
        if self._costs is None or (dataset_name == next(iter(self._quality)) and not _fixed(net)):
            if depth:
                set_depth(net, depth)
            self._costs = costs_of(net, bits, self._patches)
            if depth:
                set_depth(net, None)
        write_validation(self.opt, net, self._quality, self._costs, current_iter)

    def log_ranges(self, current_iter: int, tb_logger) -> None:
        """The ranges at the last logged training step: one line each in the log, one scalar each in TensorBoard."""
        statistics = getattr(self, "range_statistics", None)
        if statistics is None:
            return
        get_root_logger().info("Ranges on a training batch:\n\t" + "\n\t".join(statistics.lines()))
        if tb_logger:
            for name, value in statistics.scalars().items():
                tb_logger.add_scalar(name, value, current_iter)
        self.range_statistics = None


def _fixed(net: nn.Module) -> bool:
    """Whether no bits depend on the image."""
    return all(len(policy.candidates) == 1 for _, policy in policies(net))


def refuse_misspelt(val: Mapping[str, Any]) -> None:
    """Refuse keys of a ``val`` block that look like a slip of ours; all others are the host's.

    Raises:
        OptionsError: For the first of them.
    """
    for key in val:
        if key not in _OURS and difflib.get_close_matches(str(key), _OURS, n=1, cutoff=_ALIKE):
            raise OptionsError(f"val.{key}: unknown key. {suggest(str(key), _OURS)} The host's own keys are free.")


def bit_lines(name: str, bits: BitStatistics) -> list[str]:
    """The widths and their shares in one line, then the mean bits of every place, as many in a line as fit.

    Args:
        name: Of the data set.
        bits: Of its images.
    """
    places = textwrap.wrap(", ".join(f"{place}: {mean:.2f}" for place, mean in bits.places.items()), _LINE)
    return [f"bits {name}: {bits.shares_text()}; image FAB {bits.lowest:.2f} to {bits.highest:.2f}", *places]
